"""What the control plane told us."""
