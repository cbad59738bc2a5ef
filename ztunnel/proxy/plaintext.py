"""Inbound plaintext: what reaches a pod outside any tunnel (dataplane.md 4, port 15006).

STRICT mutual TLS has no code here: it is a policy that denies whoever has no identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.decide.admit import Admission, Rejection, admit_plaintext
from ztunnel.errors import RejectedError, UnreachableError
from ztunnel.linux.sockopt import original_destination, reset_on_close
from ztunnel.model.flow import Flow
from ztunnel.proxy.connection import Connection
from ztunnel.proxy.judgement import judge
from ztunnel.proxy.labels import describe_admission
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.dial import Dial
from ztunnel.transport.socket_relay import SocketRelay

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.errors import ZtunnelError
    from ztunnel.model.network import Endpoint
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket


class PlaintextConnection(Connection):
    """One captured connection without a tunnel."""

    __slots__ = ("_dial", "_original", "_relay", "_sock")

    def __init__(self, context: ProxyContext, sock: Socket, source: Endpoint) -> None:
        record = Record(
            log=context.node.access_log,
            direction=Direction.INBOUND,
            source=source,
            started=trio.current_time(),
        )
        super().__init__(context, source, record)
        self._sock = sock
        self._original: Endpoint | None = None
        self._dial: Dial | None = None
        self._relay: SocketRelay | None = None

    @property
    def original(self) -> str | None:
        """Nothing: plaintext carries no name."""
        return None

    @property
    def protocol(self) -> str:
        """`TCP`: we do not know who calls."""
        return "TCP"

    # Rooms 1 and 2: accept, classify.

    def serve(self) -> None:
        """Begin; returns at once."""
        self.context.live.inbound[self] = None
        self.attempt(self._begin, trouble="connection failed")

    def _begin(self) -> None:
        self.context.sockets.tune(self._sock)
        original = self._original = original_destination(self._sock)
        self.record.destination = original
        workload = self.context.workload()
        if workload is None:
            self.wait_for(self._serve_when_known)
        else:
            self._classify(original, workload)

    async def _serve_when_known(self) -> None:
        workload = await self.context.known_workload()
        assert self._original is not None
        if not self.is_over:
            self._classify(self._original, workload)

    def _classify(self, original: Endpoint, workload: Workload) -> None:
        node = self.context.node
        answer = admit_plaintext(
            original,
            source=self.source,
            workload=workload,
            store=node.store,
            illegal=node.illegal_ports,
        )
        if isinstance(answer, Rejection):
            raise RejectedError(answer.message, status=answer.status)
        if self.context.lacks_policy(workload):
            self.wait_for(lambda: self._authorize_when_told(answer))
        else:
            self._authorize(answer, workload)

    # Room 3: authorize.

    async def _authorize_when_told(self, admission: Admission) -> None:
        workload = await self.context.known_policies()
        if not self.is_over:
            self._authorize(admission, workload)

    def _authorize(self, admission: Admission, workload: Workload) -> None:
        node = self.context.node
        flow = self.flow = Flow(
            source=None, source_endpoint=self.source, destination=admission.destination
        )
        self.actual = admission.destination
        labels = describe_admission(
            self.record,
            node,
            workload=workload,
            identity=self.context.identity(workload),
            flow=flow,
            service=admission.service,
            request=None,
        )
        self.opened(node.metrics.traffic.traffic(labels))
        self._connect(admission, judge(node, flow, workload, self.record))

    # Room 4: connect.

    def _connect(self, admission: Admission, permit: Permit) -> None:
        source = self.source.ip if self.context.original_source else None
        sock = self.context.sockets.dial(permit, admission.dial, source=source)
        self._dial = Dial(self.context.node.reactor, sock, self)

    def on_connected(self, sock: Socket) -> None:
        """Relay between the two sockets."""
        reactor = self.context.node.reactor
        self._dial = None
        relay = self._relay = SocketRelay(reactor, self._sock, sock, self.end)
        reactor.register(self._sock, relay.downstream)
        reactor.hand_over(sock, relay.upstream)

    def on_unreachable(self, error: UnreachableError) -> None:
        """End with what the kernel said."""
        self._dial = None
        self.end(UnreachableError(f"connection failed: {error}"))

    # The end.

    def cut(self, error: ZtunnelError) -> None:
        """End now, whatever it is doing."""
        if self._relay is not None and not self.is_over:
            self._relay.cut(error)
        else:
            self.end(error)

    @property
    def is_half_open(self) -> bool:
        """Whether one end has finished and the other has not."""
        return self._relay is not None and self._relay.is_half_open

    def moved(self) -> tuple[int, int]:
        """Return the bytes moved so far: from the client, from the server."""
        relay = self._relay
        return (0, 0) if relay is None else (relay.sent_bytes, relay.received_bytes)

    def release(self, error: ZtunnelError | None) -> None:
        """Let go of both ends."""
        self.context.live.remove(self)
        self.context.connections.give_back()
        self.context.node.metrics.sockets_open(Reporter.DESTINATION).add(-1)
        if self._dial is not None:
            self._dial.cancel()
        if self._relay is None and self._sock.fileno() >= 0:
            if error is not None:
                reset_on_close(self._sock)
            self._sock.close()
