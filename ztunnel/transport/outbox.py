"""Bytes on their way into a socket that may not take them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import deque

    from ztunnel.transport.sockets import Socket


UNREAD_MOST = 1024 * 1024
"""How many bytes of frames may wait for a peer that does not read; none of them is DATA.

The core bounds what it answers by itself, by far less; this is for what streams are told.
"""


NOTHING = memoryview(b"")  # there once: a view takes 300 bytes
JOIN_BYTES = 16 * 1024  # kept pieces shorter than this grow, by a copy of about a microsecond


class Outbox:
    """Sends to a non-blocking socket and keeps, in order, what it does not take.

    Its user asks `blocked` before making more, so what is kept is one send's worth.
    """

    __slots__ = ("_kept", "_sock", "blocked")

    def __init__(self, sock: Socket) -> None:
        self._sock = sock
        self._kept = NOTHING
        self.blocked = False  # whether something is kept, or nothing will ever go again

    def is_unread(self, more: int) -> bool:
        """Tell whether the peer does not read while too much, `more` bytes, waits behind."""
        return self.blocked and more > UNREAD_MOST

    def send(self, before: bytes, data: bytes | memoryview) -> None:
        """Send `before` and `data` in one call; nothing may be kept. Copies only what stays.

        Raises:
            OSError: the connection broke; from now on it counts as blocked.
        """
        assert not self.blocked
        try:
            sent = self._sock.sendmsg((before, data)) if before else self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.blocked = True
            raise
        if sent < len(before) + len(data):
            self._kept = memoryview(before + bytes(data))[sent:]
            self.blocked = True

    def drain(self) -> bool:
        """Send what is kept; return whether nothing is left.

        Raises:
            OSError: the connection broke.
        """
        if not self._kept:
            return not self.blocked
        try:
            sent = self._sock.send(self._kept)
        except BlockingIOError:
            return False
        self._kept = self._kept[sent:]
        self.blocked = bool(self._kept)
        return not self.blocked


def rest(chunks: list[memoryview], sent: int) -> memoryview:
    """Copy what lies behind the first `sent` bytes of `chunks`."""
    left: list[memoryview] = []
    for chunk in chunks:
        if sent >= len(chunk):
            sent -= len(chunk)
        else:
            left.append(chunk[sent:])
            sent = 0
    return memoryview(b"".join(left))


def keep(pending: deque[memoryview], chunks: list[memoryview]) -> None:
    """Copy `chunks` to the end.

    Joined, also with what came before: a peer that sends single bytes must not cost us an object
    for each, in memory that no window bounds.
    """
    if pending and len(pending[-1]) < JOIN_BYTES:
        pending[-1] = memoryview(b"".join((pending[-1], *chunks)))
    else:
        pending.append(memoryview(b"".join(chunks)))


def drop(pending: deque[memoryview], sent: int) -> None:
    """Remove the first `sent` bytes."""
    while sent:
        first = pending[0]
        if sent < len(first):
            pending[0] = first[sent:]
            return
        sent -= len(first)
        pending.popleft()
