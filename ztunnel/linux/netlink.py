"""A netlink socket of our own: many messages in one send, each answered (RFC 3549, netlink(7)).

How it works: the kernel does the work inside `send`, so every answer is waiting when it returns
and nothing here blocks on another process. The socket stays in the namespace it was made in:
make it inside a pod, use it outside. pyroute2's own sockets run an event loop; we only use its
message classes, through the `Encodable` they all are.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ztunnel.linux.closing import Closing

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3

HEADER = struct.Struct("=IHHII")  # length, kind, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
# An acknowledgement takes about 1 KiB of it; a batch of ours has some fifty messages.
_RECEIVE_BUFFER_BYTES = 1 << 20
_READ_BYTES = 1 << 16


class Encodable(Protocol):
    """What we use of pyroute2's messages; `data` exists after `encode`."""

    data: bytearray

    def __getitem__(self, key: str) -> dict[str, int]:
        """Return the header for `key` "header"."""

    def encode(self) -> None:
        """Make `data` of the fields and attributes."""


def encode(message: Encodable, *, kind: int, flags: int, sequence: int) -> bytes:
    """Turn a pyroute2 message into bytes; REQUEST is added to `flags`."""
    header = message["header"]
    header["type"] = kind
    header["flags"] = NLM_F_REQUEST | flags
    header["sequence_number"] = sequence
    message.encode()
    return bytes(message.data)


@dataclass(frozen=True, slots=True)
class Failure:
    """The kernel refused one message; `text` is its explanation or that of the error number."""

    sequence: int
    number: int
    text: str


class NetlinkSocket(Closing):
    """One request at a time; blocking, but only for as long as the kernel works."""

    __slots__ = ("_sock",)

    def __init__(self, family: int) -> None:
        """Open a socket of a netlink family in the calling thread's namespace."""
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self._sock.bind((0, 0))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        except OSError:
            self._sock.close()
            raise

    def exchange(self, data: bytes, *, acks: int) -> list[Failure]:
        """Send messages with `acks` ACK flags among them; return what the kernel refused.

        Raises:
            OSError: the kernel answered fewer than it should have.
        """
        self._sock.send(data)
        answered = 0
        failures = []
        while (chunk := self._waiting()) is not None:
            for kind, flags, sequence, body in messages_in(chunk):
                if kind != NLMSG_ERROR:
                    continue
                answered += 1
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    failures.append(Failure(sequence, number, _explain(number, flags, body)))
        if answered < acks and not failures:
            raise OSError(f"the kernel answered {answered} of {acks} netlink messages")
        return failures

    def dump(self, data: bytes) -> list[bytes]:
        """Send one request with the DUMP flag and return the bodies of all answers.

        Raises:
            OSError: the kernel refused it.
        """
        self._sock.send(data)
        bodies: list[bytes] = []
        while True:
            for kind, flags, _, body in messages_in(self._sock.recv(_READ_BYTES)):
                if kind == NLMSG_DONE:
                    return bodies
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, _explain(number, flags, body))
                bodies.append(body)

    def close(self) -> None:
        """Close the socket; more than once is fine."""
        self._sock.close()

    def _waiting(self) -> bytes | None:
        try:
            return self._sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None


def messages_in(chunk: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram into (kind, flags, sequence number, body)."""
    at = 0
    while at + HEADER.size <= len(chunk):
        length, kind, flags, sequence, _ = HEADER.unpack_from(chunk, at)
        if length < HEADER.size:
            return
        yield kind, flags, sequence, chunk[at + HEADER.size : at + length]
        at += _align(length)


def attributes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split attributes into (kind, value)."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += _align(length)


def _explain(number: int, flags: int, body: bytes) -> str:
    """Read the kernel's own words, which it may add to an error (netlink extended ack)."""
    text = os.strerror(number)
    if not flags & _NLM_F_ACK_TLVS:
        return text
    # After the error number comes, with CAP_ACK, only the header of the request.
    for kind, value in attributes_in(body[4 + HEADER.size :]):
        if kind == _NLMSGERR_ATTR_MSG:
            words = value.rstrip(b"\0")
            return f"{text} ({words.decode('utf-8', 'replace')})"
    return text


def _align(length: int) -> int:
    return (length + 3) & ~3
