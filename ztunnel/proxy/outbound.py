"""Outbound: what a pod's applications open (dataplane.md 2, port 15001).

The rooms, in order: `serve` accepts, `_classify` asks where it goes, `authorize_outbound` permits,
`_connect_plain` or `_open_stream` connects, a relay carries on. A pooled tunnel and a known route
take no task; whatever must wait (for our own workload, for a dial) does so in `wait_for`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import trio

from ztunnel.decide.authorize import Permit, Refusal, authorize_outbound
from ztunnel.decide.route import Hop, HopProtocol, OutboundRequest, ResolveHostname, route
from ztunnel.errors import (
    ConnectRefusedError,
    DeniedError,
    LimitError,
    RouteError,
    TunnelError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.linux.sockopt import original_destination, reset_on_close
from ztunnel.proxy.connection import Connection
from ztunnel.proxy.double import InnerConnection
from ztunnel.proxy.labels import describe_far_side, describe_hop
from ztunnel.proxy.requests import tunnel_request
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.dial import Dial
from ztunnel.transport.pool import PoolKey
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.resolver import resolve
from ztunnel.transport.socket_relay import SocketRelay
from ztunnel.wire.headers import BAGGAGE, Traceparent, parse_baggage, values_of

if TYPE_CHECKING:
    from ztunnel.model.network import Endpoint
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.telemetry.traffic import Labels
    from ztunnel.transport.pool import Pool
    from ztunnel.transport.reactor import Deadline
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import DataReceived, ResponseReceived
    from ztunnel.wire.hbone.stream import Stream

H2_CANCEL = 8
H2_REFUSED_STREAM = 7


class OutboundConnection(Connection):
    """One captured connection; owner of its stream until the relay takes over."""

    __slots__ = (
        "_deadline",
        "_dial",
        "_hop",
        "_inner",
        "_labels",
        "_may_retry",
        "_permit",
        "_pool",
        "_relay",
        "_sock",
        "_stream",
        "_target",
        "_traceparent",
        "_tunnel",
    )

    def __init__(self, context: ProxyContext, pool: Pool, sock: Socket, source: Endpoint) -> None:
        record = Record(
            log=context.node.access_log,
            direction=Direction.OUTBOUND,
            source=source,
            started=trio.current_time(),
        )
        super().__init__(context, source, record)
        self._sock = sock
        self._pool = pool
        self._target: Endpoint | None = None
        self._hop: Hop | None = None
        self._permit: Permit | None = None
        self._dial: Dial | None = None
        self._tunnel: Tunnel | None = None
        self._stream: Stream | None = None
        self._relay: StreamRelay | SocketRelay | None = None
        self._deadline: Deadline | None = None
        self._inner: InnerConnection | None = None
        self._labels: Labels | None = None
        self._traceparent = Traceparent.new(context.node.rng)
        self._may_retry = True

    # What the connection dump shows.

    @property
    def original(self) -> str | None:
        """Where the application meant to go."""
        return None if self._target is None else str(self._target)

    @property
    def protocol(self) -> str:
        """How the next hop is reached."""
        return HopProtocol.TCP if self._hop is None else self._hop.protocol

    # Room 1 and 2: accept, classify.

    def serve(self) -> None:
        """Begin; returns at once."""
        try:
            self.context.sockets.tune(self._sock)
            target = self._target = original_destination(self._sock)
            self.record.destination = target
            workload = self.context.workload()
            if workload is None:
                self.wait_for(self._serve_when_known)
            else:
                self._classify(workload, target)
        except ZtunnelError as error:
            self.end(error)
        except OSError as error:
            self.end(UnreachableError(f"io error: {error.strerror}"))

    async def _serve_when_known(self) -> None:
        workload = await self.context.known_workload()
        assert self._target is not None
        self._classify(workload, self._target)

    def _classify(self, workload: Workload, target: Endpoint) -> None:
        node = self.context.node
        permit = self._authorize(target)
        request = OutboundRequest(source=workload, source_ip=self.source.ip, target=target)
        answer = route(request, node.store, network=node.config.network, rng=node.rng)
        match answer:
            case Hop():
                self._go(workload, answer, permit)
            case ResolveHostname():
                self.wait_for(lambda: self._resolve(workload, answer, permit))
            case _:
                raise RouteError(f"unknown address: {answer.what}")

    async def _resolve(self, workload: Workload, wanted: ResolveHostname, permit: Permit) -> None:
        addresses = await resolve(wanted.hostname)
        if addresses is None:
            raise wanted.failed()
        self._go(workload, wanted.resolved(addresses, self.context.node.rng), permit)

    # Room 3: authorize.

    def _authorize(self, target: Endpoint) -> Permit:
        match authorize_outbound(target, illegal=self.context.node.illegal_ports):
            case Permit() as permit:
                return permit
            case Refusal(reason=reason):
                raise DeniedError(reason)

    # Room 4: connect.

    def _go(self, workload: Workload, hop: Hop, permit: Permit) -> None:
        self._hop, self._permit = hop, permit
        self.actual = hop.peer
        self.context.live.outbound[self] = None
        self._labels = describe_hop(self.record, self.context.identity(workload), workload, hop)
        if hop.protocol is not HopProtocol.DOUBLE_HBONE:
            self._open_books()
        if hop.protocol is HopProtocol.TCP:
            self._connect_plain(hop, permit)
        else:
            self._connect_tunnel(workload)

    def _open_books(self) -> None:
        """Count and log the connection, as everything about it is known."""
        assert self._labels is not None
        self.opened(self.context.node.metrics.traffic.traffic(self._labels))

    def _connect_plain(self, hop: Hop, permit: Permit) -> None:
        sock = self.context.sockets.dial(permit, hop.peer)
        self._dial = Dial(self.context.node.reactor, sock, self)

    def _connect_tunnel(self, workload: Workload) -> None:
        hop, permit = self._hop, self._permit
        assert hop is not None
        assert permit is not None
        key = PoolKey(self.context.identity(workload), hop.expected, hop.peer, self.source.ip)
        tunnel = self._pool.get(key)
        if tunnel is not None:
            self._open_stream(workload, tunnel)
        else:
            self.wait_for(lambda: self._dial_tunnel(workload, key, permit))

    async def _dial_tunnel(self, workload: Workload, key: PoolKey, permit: Permit) -> None:
        tunnel = await self._pool.checkout(key, permit)
        if not self.is_over:
            self._open_stream(workload, tunnel)

    def _open_stream(self, workload: Workload, tunnel: Tunnel) -> None:
        hop = self._hop
        assert hop is not None
        assert hop.authority is not None
        inside = self._inner is not None
        headers = tunnel_request(
            hop.authority,
            workload=workload,
            source=self.source,
            service=hop.service,
            traceparent=self._traceparent,
            network=self.context.node.config.network if inside else None,
        )
        try:
            stream = tunnel.open(headers, self)
        except LimitError:
            # The tunnel filled up or began to drain since it was chosen; the pool knows better now.
            self._retry(LimitError("no tunnel takes a further stream"))
            return
        self._tunnel, self._stream = tunnel, stream
        seconds = self.context.node.config.connect_response_seconds
        self._deadline = self.context.node.reactor.deadline(seconds, self._on_no_answer)

    # The stream tells how the CONNECT went.

    def on_response(self, event: ResponseReceived) -> None:
        """Relay when the peer says 200, else end with its status."""
        if event.status != HTTPStatus.OK:
            self.end(refused(event.status))
            return
        tunnel, stream = self._tunnel, self._stream
        assert tunnel is not None
        assert stream is not None
        self._cancel_deadline()
        self._stream = None
        if self.protocol is HopProtocol.DOUBLE_HBONE:
            if self._inner is None:
                self.wait_for(lambda: self._go_inside(tunnel, stream))
                return
            self._name_far_side(event)
        relay = StreamRelay(self.context.node.reactor, self._sock, tunnel, stream, self.end)
        self._relay = relay
        self.context.node.reactor.register(self._sock, relay)
        if event.ended:
            relay.on_end()

    async def _go_inside(self, outer: Tunnel, stream: Stream) -> None:
        """Run the inner connection of a double tunnel through the outer stream."""
        hop, workload = self._hop, self.context.workload()
        assert hop is not None
        assert workload is not None
        self._inner = InnerConnection(self.context.node, self.end)
        identity = self.context.identity(workload)
        await self._inner.establish(outer, stream, hop.inner_expected, identity)
        inner = self._inner.tunnel
        if not self.is_over and inner is not None:
            self._open_stream(workload, inner)

    def _name_far_side(self, event: ResponseReceived) -> None:
        assert self._labels is not None
        assert self._inner is not None
        answer = parse_baggage(values_of(event.headers, BAGGAGE))
        self._labels = describe_far_side(self.record, self._labels, answer, self._inner.peer)
        self._open_books()

    def on_data(self, event: DataReceived) -> None:
        """Nothing: the core delivers no data before the answer, and then the relay owns it."""

    def on_end(self) -> None:
        """End: a stream that ends without an answer opened nothing."""
        self.end(TunnelError("h2 failed: stream ended without an answer"))

    def on_window(self) -> None:
        """Nothing: no data is sent before the answer."""

    def on_reset(self, code: int) -> None:
        """Try once more if the peer says that it did nothing with the stream."""
        self._stream = None
        error = TunnelError(f"h2 failed: stream reset by the peer (code {code})", code=code)
        if code == H2_REFUSED_STREAM:
            self._retry(error)
        else:
            self.end(error)

    def on_lost(self, error: ZtunnelError) -> None:
        """Try once more: nothing of the application has been sent yet."""
        self._stream = None
        self._retry(error)

    def _retry(self, error: ZtunnelError) -> None:
        workload = self.context.workload()
        self._cancel_deadline()
        if self.is_over:
            return
        if not self._may_retry or self._inner is not None or workload is None:
            self.end(error)
            return
        self._may_retry = False
        try:
            self._connect_tunnel(workload)
        except ZtunnelError as failure:
            self.end(failure)

    def _on_no_answer(self) -> None:
        seconds = self.context.node.config.connect_response_seconds
        self.end(UnreachableError(f"no answer to CONNECT from the peer within {seconds:g}s"))

    # The dial tells how the plain connect went.

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
        self.end(UnreachableError(f"io error: {error}"))

    # Room 5 is the relay; the end.

    def cut(self, error: ZtunnelError) -> None:
        """End now, whatever it is doing."""
        relay = self._relay
        if relay is not None and not self.is_over:
            relay.cut(error)
        else:
            self.end(error)

    def moved(self) -> tuple[int, int]:
        """Return the bytes moved so far: from the client, from the server."""
        match self._relay:
            case StreamRelay(read_bytes=read, written_bytes=written):
                return read, written
            case SocketRelay() as relay:
                return relay.sent_bytes, relay.received_bytes
            case _:
                return 0, 0

    def end(self, error: ZtunnelError | None) -> None:
        """Conclude; a double tunnel that failed half-way is counted as what was known of it."""
        if not self.is_over and self._labels is not None and not self.record.is_open:
            self._open_books()
        super().end(error)

    def release(self, error: ZtunnelError | None) -> None:
        """Let go of the application and of what was begun for it."""
        self._cancel_deadline()
        if self._inner is not None:
            self._inner.close()
        self.context.live.remove(self)
        self.context.connections.give_back()
        self.context.node.metrics.sockets_open(Reporter.SOURCE).add(-1)
        if self._dial is not None:
            self._dial.cancel()
        if self._stream is not None and self._tunnel is not None:
            self._stream.owner = None
            self._tunnel.core.reset(self._stream, H2_CANCEL)
            self._tunnel.released()
        if self._relay is None and self._sock.fileno() >= 0:
            if error is not None:
                # The application's connect has succeeded long ago; an abort is the nearest thing
                # to the refusal it would have met without us (dataplane.md 17.16).
                reset_on_close(self._sock)
            self._sock.close()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def refused(status: int) -> ConnectRefusedError:
    """Describe an answer other than 200."""
    try:
        phrase = f" {HTTPStatus(status).phrase}"
    except ValueError:
        phrase = ""
    return ConnectRefusedError(f"http status: {status}{phrase}", status=status)
