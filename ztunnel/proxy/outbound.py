"""Outbound: what a pod's applications open (dataplane.md 2, port 15001).

The rooms, in order: `serve` accepts, `_classify` asks where it goes, `authorize_outbound` permits,
a `Dial` or a `StreamOpening` connects, a relay carries on. A pooled tunnel and a known route take
no task; whatever must wait (for our own workload, for a dial) does so in `wait_for`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.decide.authorize import Permit, Refusal, authorize_outbound
from ztunnel.decide.route import (
    Hop,
    HopProtocol,
    OutboundRequest,
    ResolveHostname,
    Route,
    UnknownAddress,
    route,
)
from ztunnel.errors import DeniedError, UnreachableError, ZtunnelError
from ztunnel.linux.sockopt import original_destination
from ztunnel.proxy.captured import CapturedConnection
from ztunnel.proxy.labels import describe_far_side, describe_hop
from ztunnel.proxy.opening import StreamOpening
from ztunnel.proxy.ways import Way
from ztunnel.telemetry.access_log import Direction
from ztunnel.telemetry.traffic import Party
from ztunnel.transport.dial import Dial
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.resolver import resolve
from ztunnel.wire.headers import BAGGAGE, parse_baggage, values_of

if TYPE_CHECKING:
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.proxy.labels import Description
    from ztunnel.transport.pool import Pool
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import ResponseReceived
    from ztunnel.wire.hbone.stream import Stream

Fetched = frozenset[str]
NOTHING: Fetched = frozenset()
OTHER_ENDPOINT_PICKS = 8  # picks are random and weighted: enough to meet another with some luck


class OutboundConnection(CapturedConnection):
    """One captured connection."""

    __slots__ = (
        "_chosen",
        "_description",
        "_hop",
        "_opening",
        "_pool",
        "_target",
    )

    direction = Direction.OUTBOUND
    trouble = "io error"

    def __init__(self, context: ProxyContext, pool: Pool, sock: Socket, source: Endpoint) -> None:
        super().__init__(context, sock, source)
        self._pool = pool
        self._target: Endpoint | None = None
        self._chosen: Workload | None = None
        self._hop: Hop | None = None
        self._description: Description | None = None
        self._opening: StreamOpening | None = None

    # What the connection dump shows.

    @property
    def original(self) -> str | None:
        """Where the application meant to go."""
        return None if self._target is None else str(self._target)

    @property
    def protocol(self) -> str:
        """How the next hop is reached."""
        return HopProtocol.TCP if self._hop is None else self._hop.protocol

    # Rooms 1 and 2: accept, classify.

    def serve(self) -> None:
        """Begin; returns at once."""
        self.context.live.outbound[self] = None
        self.attempt(self._begin, trouble=self.trouble)

    def _begin(self) -> None:
        self.go_to(original_destination(self._sock))

    def go_to(self, target: Endpoint) -> None:
        """Find the way to where the application wants to go.

        Raises:
            ZtunnelError: there is none.
            OSError: the kernel refused at once.
        """
        self._target = target
        self.record.destination = target
        workload = self.context.workload()
        if workload is None:
            self.wait_for(self._serve_when_known)
        else:
            self._classify(workload, target)

    async def _serve_when_known(self) -> None:
        workload = await self.context.known_workload()
        assert self._target is not None
        if not self.is_over:
            self._classify(workload, self._target)

    def _classify(self, workload: Workload, target: Endpoint, fetched: Fetched = NOTHING) -> None:
        node, ways = self.context.node, self.context.ways
        way = ways.find(target, self.source.ip, node.store.version)
        if way is not None and way.permit is not None:
            self._go(workload, way, way.permit)
            return
        permit = self._authorize(target)
        match self._route(workload, target, fetched):
            case Hop() as hop:
                way = Way(hop, self.source.ip, permit)
                # On demand, an address that nobody owns is asked about again.
                if node.demand is None or hop.workload is not None:
                    way = ways.keep(target, way)
                self._go(workload, way, permit)
            case ResolveHostname() as wanted:
                self.wait_for(lambda: self._resolve(workload, wanted, permit))
            case UnknownAddress(what=what):
                self.wait_for(lambda: self._fetch(target, what, fetched))

    def _route(self, workload: Workload, target: Endpoint, fetched: Fetched = NOTHING) -> Route:
        node, feedback = self.context.node, self.context.feedback
        if feedback.outliers:
            feedback.outliers.expire(trio.current_time())
        return route(
            OutboundRequest(source=workload, source_ip=self.source.ip, target=target),
            node.store,
            network=node.config.network,
            rng=node.rng,
            on_demand=node.demand is not None,
            fetched=fetched,
            feedback=feedback,
        )

    async def _fetch(self, target: Endpoint, what: str, fetched: Fetched) -> None:
        """Ask the control plane about an address, then ask for the way again."""
        demand = self.context.node.demand
        assert demand is not None
        await demand.fetch(what)
        workload = await self.context.known_workload()
        if not self.is_over:
            self._classify(workload, target, fetched | {what})

    async def _resolve(self, workload: Workload, wanted: ResolveHostname, permit: Permit) -> None:
        node = self.context.node
        party = Party.of_workload(workload, self.context.identity(workload))
        node.metrics.on_demand_dns.count(*party.labels(), wanted.hostname).add(1)
        addresses = await resolve(wanted.hostname, ipv6=node.config.ipv6_enabled)
        if addresses is None:
            raise wanted.failed()
        if not self.is_over:
            hop = wanted.resolved(addresses, node.rng)
            self._go(workload, Way(hop, self.source.ip), permit)

    # Room 3: authorize.

    def _authorize(self, target: Endpoint) -> Permit:
        match authorize_outbound(target, illegal=self.context.node.illegal_ports):
            case Permit() as permit:
                return permit
            case Refusal(reason=reason):
                raise DeniedError(reason)

    # Room 4: connect.

    def _go(self, workload: Workload, way: Way, permit: Permit) -> None:
        hop = way.hop
        self._point_to(workload, way)
        if hop.protocol is not HopProtocol.DOUBLE_HBONE:
            self._open_books()
        if hop.protocol is HopProtocol.TCP:
            sock = self.context.sockets.dial(permit, hop.peer)
            self._dial = Dial(self.context.node.reactor, sock, self)
        else:
            opening = StreamOpening(self, self._pool, workload=workload, way=way, permit=permit)
            self._opening = opening
            opening.start()

    def _point_to(self, workload: Workload, way: Way) -> None:
        hop = self._hop = way.hop
        self._count(hop.workload)
        self.actual = hop.peer
        if way.description is None:
            way.description = describe_hop(self.context.identity(workload), workload, hop)
        self._description = way.description

    def _count(self, workload: Workload | None) -> None:
        """Let the next choice know of a connection to this endpoint, until another is named."""
        feedback = self.context.feedback
        if self._chosen is not None:
            feedback.ended(self._chosen)
        if workload is not None:
            feedback.begun(workload)
        self._chosen = workload

    def _open_books(self) -> None:
        """Count and log the connection, as everything about it is known."""
        assert self._description is not None
        self.opened(self._description)

    def another_hop(self, failed: Hop) -> Hop | None:
        """Give another endpoint of the same service, if there is one."""
        target, workload = self._target, self.context.workload()
        if failed.service is None or target is None or workload is None:
            return None
        for _ in range(OTHER_ENDPOINT_PICKS):
            other = self._route(workload, target)
            if isinstance(other, Hop) and other.protocol is failed.protocol:
                if other.peer != failed.peer:
                    self._point_to(workload, Way(other, self.source.ip))
                    return other
            else:
                break
        return None

    def on_reached(
        self, tunnel: Tunnel, stream: Stream, event: ResponseReceived, far: Identity | None
    ) -> None:
        """Relay between the application and the answered stream."""
        reactor = self.context.node.reactor
        if far is None:
            self._opening = None  # it has no inner connection to look after
        else:
            assert self._description is not None
            answer = parse_baggage(values_of(event.headers, BAGGAGE))
            self._description = describe_far_side(self._description, answer, far)
            self._open_books()
        self.greet()
        relay = self._relay = StreamRelay(reactor, self._sock, tunnel, stream, self.end)
        reactor.watch_input(self._sock, relay)
        if far is None:
            self._opening = None  # long-lived connections are many: keep only what is of use
        relay.look()  # most applications speak first, and have done so by now
        if event.ended:
            relay.on_end()

    def on_connected(self, sock: Socket) -> None:
        """Relay between the two sockets."""
        if self._hop is not None:
            self.context.feedback.outliers.reached(self._hop.peer)
        super().on_connected(sock)

    def on_unreachable(self, error: UnreachableError) -> None:
        """End with what the kernel said, and let the next choice know."""
        if self._hop is not None and self._hop.workload is not None:
            self.context.feedback.outliers.failed(self._hop.peer, trio.current_time())
        super().on_unreachable(error)

    # Room 5 is the relay; the end.

    def end(self, error: ZtunnelError | None) -> None:
        """Conclude; a double tunnel that failed half-way is counted as what was known of it."""
        if not self.is_over and self._description is not None and not self.record.is_open:
            self._open_books()
        super().end(error)

    def release(self, error: ZtunnelError | None) -> None:
        """Let go of the application and of what was begun for it."""
        self._count(None)
        if self._opening is not None:
            self._opening.give_up()
        super().release(error)
