"""Certificates kept fresh."""
