"""Waiting in the reactor for a TCP connect to end, without a task."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Protocol

from ztunnel.errors import UnreachableError
from ztunnel.transport.reactor import BROKEN, HUNG_UP, WRITABLE

if TYPE_CHECKING:
    from ztunnel.transport.reactor import Reactor

CONNECT_SECONDS = 10.0  # `CONNECTION_TIMEOUT`, dataplane.md 1.4


class Dialler(Protocol):
    """Who wants to know how the connect ended."""

    def on_connected(self, sock: socket.socket) -> None:
        """Take the connected socket; it is still in the reactor, `hand_over` moves it on."""

    def on_unreachable(self, error: UnreachableError) -> None:
        """Learn why there is no connection; the socket is closed."""


class Dial:
    """One connect under way; ends in exactly one call to its dialler, or in `cancel`.

    `silence` is what the dialler is told if nobody answers.
    """

    __slots__ = ("_deadline", "_dialler", "_reactor", "_silence", "sock")

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        dialler: Dialler,
        *,
        seconds: float = CONNECT_SECONDS,
        silence: UnreachableError | None = None,
    ) -> None:
        self._silence = silence
        self.sock = sock
        self._dialler: Dialler | None = dialler
        self._reactor = reactor
        self._deadline = reactor.deadline(seconds, self._give_up)
        reactor.register(sock, self)

    def on_event(self, events: int) -> None:
        """See whether the connect has ended."""
        if self._dialler is None or not events & (WRITABLE | HUNG_UP):
            return
        try:
            self.sock.getpeername()
        except OSError:
            if not self._has_answer(events):
                return
        dialler = self._dialler
        self._dialler = None
        self._deadline.cancel()
        if events & ~WRITABLE:  # data or an end, which is for whoever comes next
            self._reactor.look_again(self.sock)
        dialler.on_connected(self.sock)

    def cancel(self) -> None:
        """Give up without telling the dialler."""
        if self._dialler is not None:
            self._dialler = None
            self._close()

    def fail(self, error: Exception) -> None:
        """Tell the dialler of a bug of ours, so that it can let go of its own end."""
        self._end(UnreachableError(f"internal error: {error}"))

    def _has_answer(self, events: int) -> bool:
        """Tell whether a peer that is gone already has left something to read.

        Peeking, unlike SO_ERROR, leaves the reset for whoever reads what lies before it. But a
        router on this machine says "unreachable" while `connect` still holds the socket: the
        kernel then tries again for as long as nobody asks for SO_ERROR.
        """
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            if events & BROKEN:
                self._refused(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                self._refused(error.errno or 0)
        return False

    def _refused(self, code: int) -> None:
        if code:
            self._end(UnreachableError(f"{os.strerror(code)} (os error {code})"))

    def _give_up(self) -> None:
        self._end(self._silence or UnreachableError("connection timed out"))

    def _end(self, error: UnreachableError) -> None:
        dialler = self._dialler
        if dialler is not None:
            self._dialler = None
            self._close()
            dialler.on_unreachable(error)

    def _close(self) -> None:
        self._deadline.cancel()
        self._reactor.forget(self.sock)
        self.sock.close()
