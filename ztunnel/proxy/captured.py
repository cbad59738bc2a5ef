"""A connection whose near end is a socket that was redirected to us, of an application or caller.

Outbound and inbound plaintext have that in common: how it begins, how two sockets are joined, and
how the near one is let go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import trio

from ztunnel.errors import UnreachableError
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.proxy.connection import Connection
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.socket_relay import SocketRelay

if TYPE_CHECKING:
    from ztunnel.errors import ZtunnelError
    from ztunnel.model.network import Endpoint
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket

REPORTERS = {Direction.OUTBOUND: Reporter.SOURCE, Direction.INBOUND: Reporter.DESTINATION}


class CapturedConnection(Connection):
    """What outbound and plaintext connections share; whoever makes one has a place for it."""

    __slots__ = ("_sock",)

    direction: ClassVar[Direction]
    trouble: ClassVar[str]  # what the reference says before what the kernel said

    def __init__(self, context: ProxyContext, sock: Socket, source: Endpoint) -> None:
        record = Record(
            log=context.node.access_log,
            direction=self.direction,
            source=source,
            started=trio.current_time(),
        )
        super().__init__(context, source, record)
        self._sock = sock
        self._gauge(1)

    def greet(self) -> None:
        """Tell the near end that the far end stands, if its protocol has a word for it."""

    def on_connected(self, sock: Socket) -> None:
        """Relay between the two sockets."""
        reactor = self.context.node.reactor
        self._dial = None
        self.greet()
        relay = self._relay = SocketRelay(reactor, self._sock, sock, self.end)
        reactor.register(self._sock, relay.downstream)
        reactor.hand_over(sock, relay.upstream)

    def on_unreachable(self, error: UnreachableError) -> None:
        """End with what the kernel said."""
        self._dial = None
        self.end(UnreachableError(f"{self.trouble}: {error}"))

    def release(self, error: ZtunnelError | None) -> None:
        """Let go of the near end too, and of its place."""
        super().release(error)
        self.context.connections.give_back()
        self._gauge(-1)
        if self._relay is None and self._sock.fileno() >= 0:
            if error is not None:
                # The other end's connect has succeeded long ago; an abort is the nearest thing
                # to the refusal it would have met without us (dataplane.md 17.16).
                reset_on_close(self._sock)
            self._sock.close()

    def _gauge(self, more: int) -> None:
        self.context.node.metrics.sockets_open(REPORTERS[self.direction]).add(more)
