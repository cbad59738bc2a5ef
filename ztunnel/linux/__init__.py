"""Kernel to Python: thin, typed, no event loop."""
