"""How pods get into the mesh."""
