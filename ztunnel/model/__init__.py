"""Nouns: frozen, no behaviour beyond their own meaning."""
