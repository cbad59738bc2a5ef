"""A dictionary of very many entries that never takes long.

A dictionary that grows copies itself, and with it every entry: 3 ms at its 87 381st, and nothing
else runs meanwhile. This one is split by the keys' hashes into parts, each of which copies a
64th of that, and not all at once. A lookup takes some 0.1 us instead of 0.06; all parts together
are no larger than the one dictionary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

PARTS = 64  # a part of a mesh of 200 000 workloads copies itself in 0.1 ms
_MASK = PARTS - 1


class SplitMap(Generic[K, V]):
    """The operations of a dictionary that we need; its order is nobody's business."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: dict[int, dict[K, V]] = {}  # made when needed: a small map is small

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, key: K) -> bool:
        part = self._parts.get(hash(key) & _MASK)
        return part is not None and key in part

    def __setitem__(self, key: K, value: V) -> None:
        self._part(key)[key] = value

    def get(self, key: K) -> V | None:
        """Return what is stored under this key."""
        part = self._parts.get(hash(key) & _MASK)
        return None if part is None else part.get(key)

    def setdefault(self, key: K, value: V) -> V:
        """Return what is stored under this key, which is `value` if there was nothing."""
        return self._part(key).setdefault(key, value)

    def pop(self, key: K) -> V | None:
        """Remove an entry and return what was stored; unknown keys are no error."""
        number = hash(key) & _MASK
        part = self._parts.get(number)
        if part is None:
            return None
        value = part.pop(key, None)
        if not part:
            del self._parts[number]
        return value

    def values(self) -> Collection[V]:
        """Return a live view of all values, in no order of meaning."""
        return _Values(self._parts)

    def pieces(self) -> Iterator[Collection[V]]:
        """Yield all values, some of them at a time; nothing may change meanwhile."""
        for part in self._parts.values():
            yield part.values()

    def _part(self, key: K) -> dict[K, V]:
        number = hash(key) & _MASK
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = {}
        return part


class _Values(Collection[V]):
    """All values of a map that is split."""

    def __init__(self, parts: dict[int, dict[K, V]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def __iter__(self) -> Iterator[V]:
        for part in self._parts.values():
            yield from part.values()

    def __contains__(self, value: object) -> bool:
        return any(value in part.values() for part in self._parts.values())
