"""What HPACK remembers of one direction of a connection, made to be small (RFC 7541 s2.3.2).

A tunnel keeps its two tables for as long as it lives, mostly idle, and they hold a handful of
fields. `hpack` gives each table a deque, which takes 760 bytes for its first entry, and a coder of
its own. Here an entry costs what it says, and all connections share one coder for each direction,
which works on the table of whoever calls: coders keep nothing else from one block to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hpack import Decoder, Encoder, HeaderTuple
from hpack.table import HeaderTable

# RFC 7541 s4.2: two updates say everything that can be said. Without a limit one block could hold
# 64 Ki of them, at a microsecond each.
MAX_TABLE_UPDATES: Final = 2

STATIC_TABLE: Final = HeaderTable.STATIC_TABLE  # index 1 first
_ENCODER: Final = Encoder()
_DECODER: Final = Decoder()


class _Entries(list[tuple[bytes, bytes]]):
    """The entries, the newest first, as the tables of `hpack` use them."""

    __slots__ = ()

    def appendleft(self, entry: tuple[bytes, bytes]) -> None:
        """Add the newest; there is room for some hundred at most."""
        self.insert(0, entry)


class Table(HeaderTable):
    """The fields of one direction."""

    def __init__(self) -> None:
        super().__init__()
        self.dynamic_entries = _Entries()  # type: ignore[assignment]


class IncomingTable(Table):
    """The table that the peer's blocks are read with."""

    def __init__(self) -> None:
        super().__init__()
        self.by_index: dict[int, tuple[bytes, bytes]] = {}  # its user's, until the table changes

    def decode(self, block: bytes, *, max_list_size: int) -> Iterable[HeaderTuple]:
        """Read a block.

        Raises:
            HPACKError: it is broken, or its fields take more than `max_list_size`.
        """
        self.by_index.clear()
        _DECODER.header_table = self
        _DECODER.max_header_list_size = max_list_size
        return _DECODER.decode(block, raw=True)


class OutgoingTable(Table):
    """The table that our blocks are written with."""

    def __init__(self) -> None:
        super().__init__()
        self.size_changes: tuple[int, ...] = ()  # that the peer has not been told of
        # What was printed for fields of the table; its user's, until the table changes.
        self.indexed: dict[tuple[bytes, bytes], bytes] = {}

    def resize(self, size: int) -> None:
        """Follow the peer's SETTINGS_HEADER_TABLE_SIZE, which differs from what it was."""
        self.maxsize = size
        self.indexed.clear()
        # The smallest and the last one are all the peer needs (RFC 7541 s4.2), and a peer may send
        # any number of SETTINGS.
        changes = (*self.size_changes, size)
        self.size_changes = (
            changes if len(changes) <= MAX_TABLE_UPDATES else (min(changes), changes[-1])
        )

    def encode(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Print fields as a block, behind the changes of size that are due."""
        _ENCODER.header_table = self
        _ENCODER.table_size_changes = list(self.size_changes)
        self.size_changes = ()
        return _ENCODER.encode(fields, huffman=False)

    def add(self, name: bytes, value: bytes) -> None:
        """Put a field in front, after which every index means another one."""
        super().add(name, value)
        self.indexed.clear()
