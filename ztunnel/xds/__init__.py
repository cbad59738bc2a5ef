"""Configuration arriving."""
