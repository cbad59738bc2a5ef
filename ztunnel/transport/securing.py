"""A TLS handshake under way in the reactor, without a task."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from ztunnel.errors import TlsError
from ztunnel.transport.reactor import HUNG_UP, READABLE, WRITABLE

if TYPE_CHECKING:
    import socket

    from ztunnel.errors import PeerIdentityError
    from ztunnel.tls.handshake import Established, Handshake
    from ztunnel.transport.reactor import Reactor

READ_BYTES = 16 * 1024


class Secured(Protocol):
    """Who wants to know how the handshake ended."""

    def on_secured(self, established: Established, unsent: bytes) -> None:
        """Take the connection; `unsent` goes to the peer before anything else.

        The socket is still in the reactor; whoever registers it anew takes it over.
        """

    def on_insecure(self, error: Exception) -> None:
        """Learn why it failed: a TlsError, or a bug. The socket is closed, an alert was sent."""


class Securing:
    """One handshake, either role; ends in exactly one call to its owner, or in `cancel`.

    The owner sets the deadline. The last flight waits for the first record behind it, so that both
    leave in one packet and wake the peer once.
    """

    __slots__ = ("_handshake", "_owner", "_reactor", "_sock", "_unsent")

    def __init__(
        self, reactor: Reactor, sock: socket.socket, handshake: Handshake, owner: Secured
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._handshake = handshake
        self._owner: Secured | None = owner
        self._unsent = b""

    def start(self) -> None:
        """Begin; a client says hello."""
        self._reactor.register(self._sock, self)
        self._digest(b"")

    def on_event(self, events: int) -> None:
        """Move what can be moved."""
        if self._owner is not None and events & WRITABLE and self._unsent:
            self._digest(b"")
        if events & (READABLE | HUNG_UP):
            self._hear(hung_up=bool(events & HUNG_UP))

    def cancel(self) -> None:
        """Give up and close the socket, without telling the owner."""
        if self._owner is not None:
            self._owner = None
            self._close()

    def fail(self, error: Exception) -> None:
        """Tell the owner of a bug of ours."""
        owner, self._owner = self._owner, None
        if owner is not None:
            self._close()
            owner.on_insecure(error)

    def _hear(self, *, hung_up: bool) -> None:
        """Read until there is no more, or no more is needed."""
        while self._owner is not None:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._give_up(TlsError(f"tls handshake error: {error.strerror}"))
                return
            if not data:
                self._give_up(TlsError("tls handshake error: peer closed the connection"))
                return
            self._digest(data)
            if len(data) < READ_BYTES and not hung_up:
                return
        self._reactor.look_again(self._sock)  # for its new owner: something may lie behind

    def _digest(self, data: bytes) -> None:
        """Go on with what came, and tell the owner if that was all."""
        handshake = self._handshake
        try:
            self._unsent += handshake.receive(data)
            if not handshake.done:
                self._send()
                return
            established = handshake.finish()
        except TlsError as error:
            self._give_up(error)
        except OSError as error:
            self._give_up(TlsError(f"tls handshake error: {error.strerror}"))
        else:
            owner, self._owner = self._owner, None
            assert owner is not None
            owner.on_secured(established, self._unsent)

    def _send(self) -> None:
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def _give_up(self, error: TlsError) -> None:
        """Say why to the peer, as far as that is possible, and to the owner."""
        if last := self._unsent + self._handshake.data_to_send():
            with contextlib.suppress(OSError):  # it may be gone, and `error` says what matters
                self._sock.send(last)
        self.fail(error)

    def _close(self) -> None:
        self._reactor.forget(self._sock)
        self._sock.close()


def refuse(
    sock: socket.socket, established: Established, error: PeerIdentityError, unsent: bytes
) -> None:
    """Tell a peer by an alert that we do not like who it is, if it is to be told.

    `unsent` is what the handshake still owes it.
    """
    if error.code is not None:
        with contextlib.suppress(OSError):  # it may be gone already
            sock.send(unsent + established.records.alert(error.code))
