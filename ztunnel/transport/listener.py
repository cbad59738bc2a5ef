"""Accepting connections in the reactor, slowing down when the machine is out of resources."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from ztunnel.model.network import Endpoint
from ztunnel.telemetry.log import get
from ztunnel.transport.sockets import LISTEN_BACKLOG

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.transport.deadlines import Deadline
    from ztunnel.transport.reactor import Reactor

log = get("transport")

ACCEPTS_PER_TURN = 64
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
BACK_OFF_FIRST_SECONDS = 0.25
BACK_OFF_MOST_SECONDS = 4.0


class Listener:
    """A listening socket in the reactor; every accepted socket goes to `accepted` with its peer.

    Linux hands on pending network errors of the new connection through `accept`; those are skipped.
    Running out of descriptors or memory pauses accepting with a growing delay: connections wait in
    the kernel's queue meanwhile, and the loop does not spin (dataplane.md 17.8).
    """

    __slots__ = (
        "_accepted",
        "_delay",
        "_family",
        "_pause",
        "_reactor",
        "component",
        "pauses",
        "sock",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        accepted: Callable[[socket.socket, Endpoint], None],
        *,
        component: str,
    ) -> None:
        self.sock = sock
        self.component = component
        self.pauses = 0
        self._accepted = accepted
        self._family = sock.family
        self._reactor = reactor
        self._delay = BACK_OFF_FIRST_SECONDS
        self._pause: Deadline | None = None
        reactor.register(sock, self)

    @property
    def address(self) -> Endpoint:
        """Where it listens."""
        return Endpoint.of(self.sock.getsockname())

    def on_event(self, events: int) -> None:  # noqa: ARG002 - any event means: try to accept
        """Accept what waits, a bounded number per turn."""
        if self._pause is not None or self.sock.fileno() < 0:
            return
        for _ in range(ACCEPTS_PER_TURN):
            if not self._accept_one():
                return
        self._reactor.again(self)

    def finish(self) -> None:
        """Accept all who wait, then close: the kernel resets whoever is in the queue at that time.

        So a successor on the same port takes over with next to no connection lost.
        """
        try:
            for _ in range(LISTEN_BACKLOG):
                if not self._accept_one():
                    break
        except Exception:  # a bug with one of them; those accepted before are served
            log.exception("accepted connection was dropped", component=self.component)
        self.close()

    def close(self) -> None:
        """Stop accepting and give the port back."""
        if self._pause is not None:
            self._pause.cancel()
        self._reactor.forget(self.sock)
        self.sock.close()

    def fail(self, error: Exception) -> None:
        """Carry on: one connection's failure must not close the door for all."""
        log.error("accepted connection was dropped", component=self.component, error=str(error))
        self._reactor.again(self)

    def _accept_one(self) -> bool:
        """Accept a connection; whether there may be another."""
        try:
            # `accept` itself looks its family and type up in enumerations, for each connection.
            fd, address = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001
            sock = socket.socket(self._family, socket.SOCK_STREAM, 0, fd)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                self._slow_down(error)
                return False
            log.debug("accept failed", component=self.component, error=str(error))
            return True
        self._delay = BACK_OFF_FIRST_SECONDS
        try:
            sock.settimeout(0)  # non-blocking
            self._accepted(sock, Endpoint.of(address))
        except Exception:
            sock.close()
            raise
        return True

    def _slow_down(self, error: OSError) -> None:
        self.pauses += 1
        log.warning(
            "accepting slowly",
            component=self.component,
            error=str(error),
            retry_seconds=self._delay,
        )
        self._pause = self._reactor.deadline(self._delay, self._resume)
        self._delay = min(self._delay * 2, BACK_OFF_MOST_SECONDS)

    def _resume(self) -> None:
        self._pause = None
        self._reactor.again(self)
