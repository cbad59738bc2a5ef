"""Bytes on their way into a socket that may not take them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.transport.sockets import Socket


UNREAD_MOST = 1024 * 1024
"""How many bytes of frames may wait for a peer that does not read; none of them is DATA.

The core bounds what it answers by itself, by far less; this is for what streams are told.
"""


class Outbox:
    """Sends to a non-blocking socket and keeps, in order, what it does not take.

    Its user asks `blocked` before making more, so what is kept is one send's worth.
    """

    __slots__ = ("_kept", "_sock")

    def __init__(self, sock: Socket) -> None:
        self._sock = sock
        self._kept: memoryview | None = None

    @property
    def blocked(self) -> bool:
        """Whether something is kept."""
        return self._kept is not None

    def is_unread(self, more: int) -> bool:
        """Tell whether the peer does not read while too much, `more` bytes, waits behind."""
        return self._kept is not None and more > UNREAD_MOST

    def send(self, before: bytes, data: bytes | memoryview) -> None:
        """Send `before` and `data` in one call; nothing may be kept. Copies only what stays.

        Raises:
            OSError: the connection broke; from now on it counts as blocked.
        """
        assert self._kept is None
        try:
            sent = self._sock.sendmsg((before, data)) if before else self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._kept = memoryview(b"")
            raise
        if sent < len(before) + len(data):
            self._kept = memoryview(before + bytes(data))[sent:]

    def drain(self) -> bool:
        """Send what is kept; return whether nothing is left.

        Raises:
            OSError: the connection broke.
        """
        kept = self._kept
        if not kept:
            return kept is None
        try:
            sent = self._sock.send(kept)
        except BlockingIOError:
            return False
        self._kept = kept[sent:] if sent < len(kept) else None
        return self._kept is None
