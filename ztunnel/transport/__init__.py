"""Bytes in motion: the only floor with streams and threads."""
