"""HTTP/2 frames as bytes: kinds, flags, sizes and the few frames we print (RFC 9113 s4, s6)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from h2.settings import SettingCodes

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 s3.4

FRAME_HEADER_SIZE: Final = 9
MAX_STREAM_ID: Final = 2**31 - 1
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
MIN_MAX_FRAME_SIZE: Final = 16_384  # also the value in force before SETTINGS
MAX_MAX_FRAME_SIZE: Final = 2**24 - 1

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

DATA: Final = 0x0  # a plain integer, because the enumeration's members compare slowly


class FrameKind(IntEnum):
    """The frame types of RFC 9113 s6; any other is ignored."""

    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


# Length and kind in one, flags, stream id: `struct` has no 24-bit integer.
DATA_HEADER: Final = struct.Struct(">IBI")
KIND_BITS: Final = 8
KIND_MASK: Final = 0xFF
UINT32: Final = struct.Struct(">I")
TWO_UINT32: Final = struct.Struct(">II")
SETTING: Final = struct.Struct(">HI")


def pack_data_header(
    buffer: bytearray | memoryview, offset: int, stream_id: int, size: int
) -> None:
    """Write the 9-byte header of a DATA frame of `size` payload bytes at `offset`."""
    DATA_HEADER.pack_into(buffer, offset, size << KIND_BITS, 0, stream_id)


def pack_frame(kind: FrameKind, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Print one frame."""
    return DATA_HEADER.pack(len(payload) << KIND_BITS | kind, flags, stream_id) + payload


def pack_window_update(stream_id: int, increment: int) -> bytes:
    """Print a WINDOW_UPDATE; stream 0 is the connection."""
    return pack_frame(FrameKind.WINDOW_UPDATE, 0, stream_id, UINT32.pack(increment))


def pack_reset(stream_id: int, code: int) -> bytes:
    """Print a RST_STREAM."""
    return pack_frame(FrameKind.RST_STREAM, 0, stream_id, UINT32.pack(code))


def pack_goaway(last_stream_id: int, code: int, debug: bytes) -> bytes:
    """Print a GOAWAY."""
    return pack_frame(FrameKind.GOAWAY, 0, 0, TWO_UINT32.pack(last_stream_id, code) + debug)


def pack_settings(values: dict[SettingCodes, int]) -> bytes:
    """Print a SETTINGS frame."""
    payload = b"".join(SETTING.pack(code, value) for code, value in values.items())
    return pack_frame(FrameKind.SETTINGS, 0, 0, payload)
