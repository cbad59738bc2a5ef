"""Whom we serve: the pods of this node."""
