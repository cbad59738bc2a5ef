"""What a delta xDS client holds, told to a server that it meets again (state-and-xds.md 4.2).

A hundred thousand names and versions are told at once, so each is kept the way it is sent: an
entry of the map `initial_resource_versions`. Telling them is then no more than joining them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b

from ztunnel.model.split_map import MASK, SplitMap

DIGEST_BYTES = 16

# protobuf encoding: number of the field << 3 | 2 for bytes with a length before them.
_ENTRY_TAG = b"\x2a"  # initial_resource_versions = 5
_KEY_TAG = b"\x0a"
_VALUE_TAG = b"\x12"
_NO_VERSION = b"\x00"  # begins the mark of a resource without a version; never an entry's tag
_LENGTH_BITS = 7
_LENGTHS = 4096  # pairs of lengths that are remembered


class HeldVersions:
    """Name to mark; a mark is equal only for the same version, or the same bytes without one."""

    __slots__ = ("_digests", "_entries")

    def __init__(self) -> None:
        self._entries: SplitMap[str, bytes] = SplitMap()
        # Of what came without a version, as policies do.
        self._digests: SplitMap[str, bytes] = SplitMap()

    def __len__(self) -> int:
        return len(self._entries) + len(self._digests)

    def __contains__(self, name: str) -> bool:
        return name in self._entries.of(name) or name in self._digests.of(name)

    def holds(self, name: str, mark: bytes) -> bool:
        """Tell whether what we hold under this name has this mark."""
        part = hash(name) & MASK
        entries, digests = self._entries.parts[part], self._digests.parts[part]
        return (entries.get(name) or digests.get(name)) == mark

    def put(self, name: str, mark: bytes) -> None:
        """Note what is held from now on."""
        part = hash(name) & MASK
        entries, digests = self._entries.parts[part], self._digests.parts[part]
        if mark.startswith(_NO_VERSION):
            entries.pop(name, None)
            digests[name] = mark
        else:
            digests.pop(name, None)
            entries[name] = mark

    def remove(self, name: str) -> None:
        """Forget a name; unknown ones are no error."""
        self._entries.of(name).pop(name, None)
        self._digests.of(name).pop(name, None)

    def told(self, wanted: Iterable[str] = ()) -> Iterator[bytes]:
        """Yield pieces of an encoded request that tell all this; put nothing meanwhile.

        `wanted` are names to be told without a version, unless they are held.
        """
        yield b"".join([encode_entry(name, "") for name in wanted if name not in self])
        for digests in self._digests.parts:
            yield b"".join([encode_entry(name, "") for name in digests])
        for entries in self._entries.parts:
            yield b"".join(entries.values())


def mark_of(name: str, version: str, value: bytes) -> bytes:
    """Return the mark of a resource; the bytes count only if there is no version."""
    if version:
        return encode_entry(name, version)
    return _NO_VERSION + blake2b(value, digest_size=DIGEST_BYTES).digest()


def encode_entry(name: str, version: str) -> bytes:
    """Encode one entry of the map, tag included."""
    key, value = name.encode(), version.encode()
    head, middle = _frame(len(key), len(value))
    return b"".join((head, key, middle, value))


@lru_cache(maxsize=_LENGTHS)
def _frame(key_bytes: int, value_bytes: int) -> tuple[bytes, bytes]:
    """Return what stands before the key and before the value."""
    before_key = _KEY_TAG + _varint(key_bytes)
    before_value = _VALUE_TAG + _varint(value_bytes)
    size = len(before_key) + key_bytes + len(before_value) + value_bytes
    return _ENTRY_TAG + _varint(size) + before_key, before_value


def _varint(number: int) -> bytes:
    encoded = bytearray()
    more = 1 << _LENGTH_BITS
    while number >= more:
        encoded.append(number % more | more)
        number >>= _LENGTH_BITS
    encoded.append(number)
    return bytes(encoded)
