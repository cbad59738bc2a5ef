"""What a client offers in its ClientHello, as far as `ssl` does not check it (RFC 8446 s4.1.2).

Python's `ssl` goes on without ALPN when a client offers only protocols we do not speak, and its
TLS 1.3 suites cannot be chosen before Python 3.15. So a server reads the offer itself. OpenSSL
judges everything else about the message.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert

CLIENT_HELLO = 1
GROUPS_EXTENSION = b"\0\x0a"
ALPN_EXTENSION = b"\0\x10"
MESSAGE_HEADER_BYTES = 4
FIXED_BYTES = 2 + 32  # legacy version, random


@dataclass(frozen=True, slots=True)
class ClientOffer:
    """What a client knows and wants.

    Suites and key exchange groups by number; `protocols` None = it did not use ALPN.
    """

    suites: tuple[int, ...]
    protocols: tuple[bytes, ...] | None
    groups: tuple[int, ...] = ()


def whole_message(handshake: bytes | bytearray) -> bool:
    """Say whether the first handshake message is there to its end."""
    if len(handshake) < MESSAGE_HEADER_BYTES:
        return False
    return len(handshake) >= MESSAGE_HEADER_BYTES + int.from_bytes(handshake[1:4], "big")


def parse_client_hello(handshake: bytes) -> ClientOffer:
    """Read a whole ClientHello, given with its four byte header.

    Raises:
        TlsError: it is not one, or its lengths do not fit; `code` says which alert to send.
    """
    if handshake[:1] not in (b"", bytes((CLIENT_HELLO,))):
        raise TlsError("expected a ClientHello", code=Alert.UNEXPECTED_MESSAGE)
    at, end = _vector(handshake, 1, 3, len(handshake))
    _, at = _vector(handshake, at + FIXED_BYTES, 1, end)  # legacy session id
    begin, at = _vector(handshake, at, 2, end)
    suites = _numbers(handshake[begin:at])
    _, at = _vector(handshake, at, 1, end)  # legacy compression methods
    protocols = None
    groups: tuple[int, ...] = ()
    at, stop = _vector(handshake, at, 2, end) if at < end else (end, end)
    while at < stop:
        kind = handshake[at : at + 2]
        begin, at = _vector(handshake, at + 2, 2, stop)
        if kind == ALPN_EXTENSION:
            protocols = _protocols(handshake[begin:at])
        elif kind == GROUPS_EXTENSION:
            first, last = _vector(handshake, begin, 2, at)
            groups = _numbers(handshake[first:last])
    return ClientOffer(suites, protocols, groups)


def _vector(data: bytes, at: int, width: int, end: int) -> tuple[int, int]:
    """Give where the content of a vector begins and ends, whose length has `width` bytes."""
    begin = at + width
    stop = begin + int.from_bytes(data[at:begin], "big")
    if begin > end or stop > end:
        raise TlsError("malformed ClientHello", code=Alert.DECODE_ERROR)
    return begin, stop


def _numbers(content: bytes) -> tuple[int, ...]:
    """Read a vector of two-byte numbers."""
    if len(content) % 2:
        raise TlsError("malformed ClientHello", code=Alert.DECODE_ERROR)
    return struct.unpack(f"!{len(content) // 2}H", content)


def _protocols(content: bytes) -> tuple[bytes, ...]:
    """Read the ProtocolNameList of RFC 7301 s3.1."""
    at, end = _vector(content, 0, 2, len(content))
    found = []
    while at < end:
        begin, at = _vector(content, at, 1, end)
        found.append(content[begin:at])
    return tuple(found)
