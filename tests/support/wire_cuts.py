"""Cutting bytes as a network may."""

from __future__ import annotations

from itertools import pairwise


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut `data` at any places at all."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]
