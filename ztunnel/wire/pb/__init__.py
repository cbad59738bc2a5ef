"""Generated from .proto; never edited, never imported outside wire/."""
