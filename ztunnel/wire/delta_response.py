"""Take a DeltaDiscoveryResponse apart without decoding all of it at once.

A first response may have 100 MiB; protobuf would decode it in one call that nothing can interrupt
(performance.md 9). Here the outer message is walked field by field, as many at a time as the
caller likes (protobuf encoding: a tag, then a length, then bytes), and each resource is decoded
alone, so that a broken one does not spoil the others.
"""

from __future__ import annotations

from array import array
from typing import cast

from google.protobuf.message import DecodeError

from ztunnel.errors import ResourceError
from ztunnel.wire.pb import xds_pb2

# Twenty times the largest mesh we know of; without a limit, empty ones would be all places.
RESOURCES_MAX = 4_000_000

RELEASED_BYTES = 4 * 1024 * 1024  # as many at once do not matter

_VARINT_BITS_MAX = 64


class _WireType:
    """How long a field is."""

    VARINT = 0
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5


class _Field:
    """What a field is (state-and-xds.md 6.1)."""

    RESOURCE = 2
    TYPE_URL = 4
    NONCE = 5
    REMOVED = 6


_RESOURCE_TAG = _Field.RESOURCE << 3 | _WireType.BYTES


class DeltaResponse:
    """One response; `scan` first until it says there is no more, then read the rest.

    A `bytearray` becomes ours: `release` empties it.
    """

    __slots__ = ("_data", "_ends", "_position", "_starts", "nonce", "removed", "type_url")

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data
        self._position = 0
        # Eight bytes each; a list of numbers has forty, and leaves holes where they were.
        self._starts = array("Q")
        self._ends = array("Q")
        self.type_url = ""
        self.nonce = ""
        self.removed: list[str] = []

    def __len__(self) -> int:
        """Return the number of resources found so far."""
        return len(self._starts)

    def scan(self, fields: int) -> bool:
        """Walk over some fields; return whether there are more.

        Raises:
            ResourceError: this is no such message.
        """
        data, position = self._data, self._position
        end = len(data)
        try:
            while fields > 0 and position < end:
                fields -= 1
                if data[position] == _RESOURCE_TAG:
                    start, position = self._span(position + 1)
                    self._starts.append(start)
                    self._ends.append(position)
                else:
                    position = self._other_field(position)
        except (IndexError, UnicodeDecodeError) as exc:
            raise ResourceError(f"not a response: cut or garbled at byte {position}") from exc
        if len(self._starts) > RESOURCES_MAX:
            raise ResourceError(f"a response with more than {RESOURCES_MAX} resources")
        self._position = position
        return position < end

    def resource(self, number: int) -> xds_pb2.Resource:
        """Decode the envelope of one resource.

        Raises:
            ResourceError: it is broken; the others may be sound.
        """
        try:
            part = self._data[self._starts[number] : self._ends[number]]
            # A bytearray will do as well, which the type stubs do not know.
            return xds_pb2.Resource.FromString(cast("bytes", part))
        except DecodeError as exc:
            raise ResourceError(f"not a Resource message: {exc}") from exc

    def take_removed(self, most: int) -> list[str]:
        """Give the next names of what is gone; none when all were given."""
        taken = self.removed[-most:] if most else []
        del self.removed[len(self.removed) - len(taken) :]
        return taken

    def release(self) -> bool:
        """Give half of a large message back, once it was read; return whether to come again.

        To free all of it at once takes as long as several turns.
        """
        data = self._data
        if not isinstance(data, bytearray) or len(data) <= RELEASED_BYTES:
            return False
        del data[len(data) // 2 :]
        return True

    def _span(self, position: int) -> tuple[int, int]:
        """Return where the bytes behind a length at `position` start and end."""
        length, start = self._varint(position)
        end = start + length
        if end > len(self._data):
            raise IndexError
        return start, end

    def _varint(self, position: int) -> tuple[int, int]:
        """Return the number at `position` and where it ends."""
        data = self._data
        byte = data[position]
        if byte < 0x80:  # noqa: PLR2004 the bit that says there is more
            return byte, position + 1
        number = shift = 0
        while byte >= 0x80:  # noqa: PLR2004
            number |= (byte & 0x7F) << shift
            shift += 7
            position += 1
            if shift >= _VARINT_BITS_MAX:
                raise IndexError
            byte = data[position]
        return number | byte << shift, position + 1

    def _other_field(self, position: int) -> int:
        """Read or skip a field that is no resource; return where it ends."""
        tag, start = self._varint(position)
        match tag & 7:
            case _WireType.BYTES:
                start, end = self._span(start)
                self._text_field(tag >> 3, self._data[start:end])
            case _WireType.VARINT:
                _, end = self._varint(start)
            case _WireType.FIXED64:
                end = start + 8
            case _WireType.FIXED32:
                end = start + 4
            case _:
                raise IndexError
        if end > len(self._data) or tag >> 3 == 0:
            raise IndexError
        return end

    def _text_field(self, field: int, value: bytes | bytearray) -> None:
        match field:
            case _Field.TYPE_URL:
                self.type_url = value.decode()
            case _Field.NONCE:
                self.nonce = value.decode()
            case _Field.REMOVED:
                self.removed.append(value.decode())
                if len(self.removed) > RESOURCES_MAX:
                    raise IndexError
            case _:
                pass  # from a later version of the protocol
