"""Bytes to nouns and back: sans-IO protocols and codecs."""
