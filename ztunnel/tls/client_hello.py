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
GROUPS_EXTENSION = 10
ALPN_EXTENSION = 16
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


class _Reader:
    """A cursor over bytes; reading past the end is a TlsError."""

    __slots__ = ("_at", "_bytes")

    def __init__(self, data: bytes) -> None:
        self._bytes = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._bytes)

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._bytes):
            raise TlsError("malformed ClientHello", code=Alert.DECODE_ERROR)
        taken = self._bytes[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> bytes:
        return self.take(self.number(length_size))


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
    message = _Reader(handshake)
    if message.number(1) != CLIENT_HELLO:
        raise TlsError("expected a ClientHello", code=Alert.UNEXPECTED_MESSAGE)
    body = _Reader(message.vector(3))
    body.take(FIXED_BYTES)
    body.vector(1)  # legacy session id
    suites = _numbers(body.vector(2))
    body.vector(1)  # legacy compression methods
    protocols = None
    groups: tuple[int, ...] = ()
    extensions = _Reader(body.vector(2)) if body else body
    while extensions:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == ALPN_EXTENSION:
            protocols = _protocols(content)
        elif kind == GROUPS_EXTENSION:
            groups = _numbers(_Reader(content).vector(2))
    return ClientOffer(suites, protocols, groups)


def _numbers(content: bytes) -> tuple[int, ...]:
    """Read a vector of two-byte numbers."""
    if len(content) % 2:
        raise TlsError("malformed ClientHello", code=Alert.DECODE_ERROR)
    return struct.unpack(f"!{len(content) // 2}H", content)


def _protocols(content: bytes) -> tuple[bytes, ...]:
    """Read the ProtocolNameList of RFC 7301 s3.1."""
    names = _Reader(_Reader(content).vector(2))
    found = []
    while names:
        found.append(names.vector(1))
    return tuple(found)
