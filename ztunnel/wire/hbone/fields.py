"""Header blocks to fields and back, and which fields make a message (RFC 9113 s8.2, s8.3, s8.5).

A broken block is an error of the connection, because the peer's table and ours no longer agree. A
sound block with wrong fields is malformed: an error of its stream only.
"""

from __future__ import annotations

import re
from typing import Final

from h2.errors import ErrorCodes
from hpack import NeverIndexedHeaderTuple
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.hpack import encode_integer

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.events import Headers
from ztunnel.wire.hbone.settings import DEFAULT_HEADER_TABLE_SIZE
from ztunnel.wire.hbone.tables import (
    MAX_TABLE_UPDATES,
    STATIC_TABLE,
    IncomingTable,
    OutgoingTable,
)

CONNECT: Final = b"CONNECT"
UNIQUE_FIELDS: Final = frozenset((b"forwarded", b"traceparent"))
_NEVER_INDEXED: Final = {name: b"\x10%c%b" % (len(name), name) for name in UNIQUE_FIELDS}
Field = tuple[bytes, bytes]

_UPDATE_MASK: Final = 0xE0  # RFC 7541 s6.3: 001 and a five-bit prefix
_UPDATE: Final = 0x20
_UPDATE_SIZE_MASK: Final = 0x1F
_CONTINUES: Final = 0x80

_INDEXED: Final = 0x80  # RFC 7541 s6.1: one bit and a seven-bit index
_STATIC: Final = {_INDEXED | index: field for index, field in enumerate(STATIC_TABLE, 1)}
_LONG_INDEX: Final = 0xFF
_NEVER: Final = 0x10  # RFC 7541 s6.2.3: a literal that must stay one, its name a literal too
_LONG: Final = 0x7F  # RFC 7541 s5.2: a string of this length or more has a longer prefix
_HUFFMAN: Final = 0x80
ENTRY_OVERHEAD: Final = 32  # RFC 9113 s6.5.2

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # RFC 9110 s5.1, lower case only
_NUL, _LF, _CR = b"\x00\n\r"
_STATUS: Final = re.compile(rb"[1-5][0-9][0-9]")

_REQUEST_PSEUDO: Final = frozenset((b":method", b":scheme", b":authority", b":path"))
_RESPONSE_PSEUDO: Final = frozenset((b":status",))
_OURS: Final = frozenset((b"baggage", *UNIQUE_FIELDS))  # names that need no further look
_PRINTED: Final = {(b":status", b"200"): b"\x88"}  # RFC 7541 app. A
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)


class FieldCodec:
    """Both HPACK tables of a connection.

    How it works: what repeats from tunnel to tunnel is in the tables after the first one, so nearly
    every later block only points into them. Those are read and written here, from what the tables
    gave for the same index or field before; `hpack` does all that changes a table, and whatever
    else is unusual. Both ends of one tunnel then need a fifth of the time.

    Our first block leaves the table alone: many a tunnel carries one stream in all its life, and to
    fill two tables takes both ends longer than anything else about the request. A table that was
    never filled is not even there.
    """

    __slots__ = ("_begun", "_max_list_size", "_ours", "_theirs")

    def __init__(self, *, max_list_size: int) -> None:
        self._begun = False
        self._ours: OutgoingTable | None = None
        self._theirs: IncomingTable | None = None
        self._max_list_size = max_list_size

    def resize(self, size: int) -> None:
        """Follow the peer's SETTINGS_HEADER_TABLE_SIZE."""
        size = min(size, DEFAULT_HEADER_TABLE_SIZE)
        if size != (self._ours.maxsize if self._ours else DEFAULT_HEADER_TABLE_SIZE):
            ours = self._ours = self._ours or OutgoingTable()
            ours.resize(size)

    def encode(self, headers: Headers) -> bytes:
        """Print fields as one header block.

        Without Huffman codes, which cost more time than they save, and without putting fields into
        the table that are new for every tunnel: those would push out the ones that are not.
        """
        ours = self._ours
        if ours is not None and ours.size_changes:  # which must come out in front of all fields
            return _encode_by_table(ours, headers)
        if not self._begun:
            self._begun = True
            return b"".join([_PRINTED.get(field) or _literal(*field) for field in headers])
        if ours is None:
            ours = self._ours = OutgoingTable()
        indexed = ours.indexed
        return b"".join([indexed.get(field) or _encode_one(ours, field) for field in headers])

    def decode(self, block: bytes) -> Headers:
        """Read one header block.

        Raises:
            TunnelError: COMPRESSION_ERROR, the block is broken; ENHANCE_YOUR_CALM, the list is
                larger than we take.
        """
        usual = self._decode_usual(block)
        if usual is not None:
            return usual
        _check_table_updates(block)
        theirs = self._theirs = self._theirs or IncomingTable()
        try:
            headers = theirs.decode(block, max_list_size=self._max_list_size)
        except OversizedHeaderListError as error:
            raise TunnelError(str(error), code=ErrorCodes.ENHANCE_YOUR_CALM) from error
        except HPACKError as error:
            # Not its text: the peer reads ours, and that one shows an address of our memory.
            raise TunnelError(
                f"broken header block: {type(error).__name__}", code=ErrorCodes.COMPRESSION_ERROR
            ) from error
        return list(headers)

    def _decode_usual(self, block: bytes) -> Headers | None:
        """Read a block of short indexes and short plain literals; None if it is not just that.

        Nothing that is read here changes the table, so giving up half-way costs only time.
        """
        theirs = self._theirs
        by_index, headers = _STATIC if theirs is None else theirs.by_index, []
        position, end, size = 0, len(block), 0
        while position < end:
            first = block[position]
            if first > _INDEXED and first != _LONG_INDEX:
                field = by_index.get(first) or _look_up(theirs, first)
                position += 1
            elif first & ~_NEVER == 0 and position + 1 < end:
                middle = position + 2 + block[position + 1]
                begin, stop = _extent(block, middle, end)
                # A length byte above 126 is a longer length, or a Huffman code.
                if stop > end or block[position + 1] >= _LONG:
                    return None
                field = block[position + 2 : middle], block[begin:stop]
                position = stop
            else:
                return None
            if field is None:
                return None
            headers.append(field)
            size += len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        return headers if size <= self._max_list_size else None


def _encode_one(ours: OutgoingTable, field: Field) -> bytes:
    name, value = field
    if name in UNIQUE_FIELDS and len(value) < _LONG:
        return b"%b%c%b" % (_NEVER_INDEXED[name], len(value), value)
    block = _encode_by_table(ours, [field])
    if block[0] & _INDEXED:
        ours.indexed[field] = block
    return block


def _encode_by_table(ours: OutgoingTable, headers: Headers) -> bytes:
    return ours.encode(
        NeverIndexedHeaderTuple(*field) if field[0] in UNIQUE_FIELDS else field for field in headers
    )


def _look_up(theirs: IncomingTable | None, first: int) -> Field | None:
    if theirs is None:
        return None  # there is nothing beyond `_STATIC`
    try:
        name, value = theirs.get_by_index(first & ~_INDEXED)
    except HPACKError:
        return None
    field = theirs.by_index[first] = bytes(name), bytes(value)
    return field


def _extent(block: bytes, at: int, end: int) -> tuple[int, int]:
    """Give where a plain string begins and ends whose length is at `at`.

    It ends behind `end` if that is so, or if the length needs more than a second byte.
    """
    length = block[at] if at < end else _HUFFMAN
    if length < _LONG:
        return at + 1, at + 1 + length
    if length == _LONG and at + 1 < end and block[at + 1] < _CONTINUES:
        return at + 2, at + 2 + _LONG + block[at + 1]
    return at, end + 1


def _literal(name: bytes, value: bytes) -> bytes:
    """Print a field that goes into no table (RFC 7541 s6.2.2, s6.2.3)."""
    kind = _NEVER if name in UNIQUE_FIELDS else 0
    return b"%c%b%b%b%b" % (kind, _length(len(name)), name, _length(len(value)), value)


def _length(length: int) -> bytes:
    return bytes((length,)) if length < _LONG else bytes(encode_integer(length, 7))


def _check_table_updates(block: bytes) -> None:
    """Raise TunnelError if `block` begins with more table updates than make sense."""
    position = 0
    for _ in range(MAX_TABLE_UPDATES + 1):
        if block[position : position + 1] == b"" or block[position] & _UPDATE_MASK != _UPDATE:
            return
        # An integer with a five-bit prefix (RFC 7541 s5.1): go past its continuation bytes.
        more = block[position] & _UPDATE_SIZE_MASK == _UPDATE_SIZE_MASK
        position += 1
        while more and position < len(block):
            more = block[position] >= _CONTINUES
            position += 1
    raise TunnelError("too many table size updates", code=ErrorCodes.COMPRESSION_ERROR)


def is_request(headers: Headers) -> bool:
    """Tell whether these fields make a well-formed request, of any method.

    A CONNECT has `:authority` and neither `:scheme` nor `:path`. The extended form (RFC 8441) is
    malformed, because we never announce it; a plain-looking tunnel must not come out of it.
    """
    pseudo = _split(headers, _REQUEST_PSEUDO)
    if pseudo is None:
        return False
    if pseudo.get(b":method") == CONNECT:
        return len(pseudo) == 2 and bool(pseudo.get(b":authority"))  # noqa: PLR2004 - those two
    return all(pseudo.get(name) for name in (b":method", b":scheme", b":path"))


def status_of(headers: Headers) -> int | None:
    """Return the status of a well-formed response, None if it is malformed."""
    pseudo = _split(headers, _RESPONSE_PSEUDO)
    if not pseudo or _STATUS.fullmatch(pseudo[b":status"]) is None:
        return None
    return int(pseudo[b":status"])


def is_trailers(headers: Headers) -> bool:
    """Tell whether these fields may end a message: well formed, no pseudo field."""
    return _split(headers, frozenset()) is not None


def _split(headers: Headers, allowed: frozenset[bytes]) -> dict[bytes, bytes] | None:
    """Return the pseudo fields, or None if a field is not allowed or stands in a wrong place."""
    pseudo: dict[bytes, bytes] = {}
    regular = False
    for name, value in headers:
        # RFC 9113 s8.2.1, in a quarter of the time that a regular expression takes.
        if _NUL in value or _LF in value or _CR in value or len(value.strip(b" \t")) < len(value):
            return None
        if name[:1] == b":":
            if regular or name in pseudo or name not in allowed:
                return None
            pseudo[name] = value
        elif name not in _OURS and not _is_regular(name, value):
            return None
        else:
            regular = True
    return pseudo


def _is_regular(name: bytes, value: bytes) -> bool:
    """Tell whether a field that is no pseudo field may stand in a message at all."""
    if _NAME.fullmatch(name) is None or name in _CONNECTION_SPECIFIC:
        return False
    return name != b"te" or value == b"trailers"
