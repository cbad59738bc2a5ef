"""How operators look in."""
