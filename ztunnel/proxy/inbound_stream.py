"""One CONNECT on an inbound tunnel, from request to relay (dataplane.md 3.3 to 3.10).

The rooms, in the reference's order so that the same wrong request gets the same status: `serve`
accepts and reads the request, `_classify` asks whether it is for us, `_authorize` asks policy,
`_connect` reaches the application, and only then is 200 said. Whatever the client sends before that
is kept, at most one window of it, as no credit is given back.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import trio

from ztunnel.decide.admit import Admission, Rejection, admit
from ztunnel.decide.authorize import permit_again
from ztunnel.decide.route import UnknownAddress
from ztunnel.errors import (
    DeniedError,
    LimitError,
    PeerError,
    RejectedError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.model.flow import Flow
from ztunnel.model.network import Endpoint, HostPort
from ztunnel.proxy.connection import Connection
from ztunnel.proxy.entrances import Entrance, Question
from ztunnel.proxy.judgement import explain, judge
from ztunnel.proxy.labels import describe_admission
from ztunnel.proxy.requests import TunnelRequest, response_headers
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.transport.dial import Dial
from ztunnel.transport.relay import StreamRelay
from ztunnel.wire.hbone.events import DataReceived
from ztunnel.wire.proxy_protocol import proxy_header

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import RequestReceived, ResponseReceived
    from ztunnel.wire.hbone.stream import Stream

Authority = Endpoint | HostPort


class InboundStream(Connection):
    """One stream; its owner until the relay takes over."""

    __slots__ = (
        "_admission",
        "_early",
        "_ended",
        "_has_place",
        "_request",
        "_stream",
        "_tunnel",
    )

    def __init__(self, context: ProxyContext, tunnel: Tunnel, request: RequestReceived) -> None:
        facts = tunnel.facts
        record = Record(
            log=context.node.access_log,
            direction=Direction.INBOUND,
            source=facts.remote,
            started=trio.current_time(),
            destination=facts.local,
        )
        super().__init__(context, facts.remote, record)
        self._tunnel = tunnel
        self._stream: Stream = request.stream
        self._request = TunnelRequest.read(request.headers)
        self._admission: Admission | None = None
        self._early = bytearray()
        self._ended = self._has_place = False
        request.stream.owner = self

    # What the connection dump shows.

    @property
    def original(self) -> str | None:
        """The host name the caller meant, if it said one."""
        return self._request.forwarded_host

    @property
    def protocol(self) -> str:
        """`HBONE` if we know who calls."""
        return "HBONE" if self._tunnel.facts.peer is not None else "TCP"

    # Rooms 1 and 2: accept, classify.

    def serve(self) -> None:
        """Begin; returns at once."""
        self.context.live.inbound[self] = None
        self.attempt(self._begin, trouble="connection failed")

    def _begin(self) -> None:
        places = self.context.connections
        self._has_place = places.take()
        if not self._has_place:
            self.context.node.metrics.limits_reached.count("connections_per_pod").add(1)
            raise LimitError(f"the pod has {places.most} connections already")
        version = self.context.node.store.version
        entrance = self.context.entrances.find(self._question(), version)
        if entrance is not None:
            self._enter_again(entrance)
            return
        authority = self._request.authority()
        workload = self.context.workload()
        if workload is None:
            self.wait_for(lambda: self._serve_when_known(authority))
        else:
            self._classify(authority, workload)

    async def _serve_when_known(self, authority: Authority) -> None:
        workload = await self.context.known_workload()
        if not self.is_over:
            self._classify(authority, workload)

    def _classify(
        self, authority: Authority, workload: Workload, fetched: frozenset[str] = frozenset()
    ) -> None:
        node = self.context.node
        answer = admit(
            self._tunnel.facts.local,
            authority,
            workload=workload,
            store=node.store,
            illegal=node.illegal_ports,
            network=node.config.network,
            forwarded_host=self._request.forwarded_host,
            tunnels_to_loopback=node.config.localhost_app_tunnel,
            on_demand=node.demand is not None,
            fetched=fetched,
        )
        match answer:
            case Admission():
                self._admission = answer
                if self.context.lacks_policy(workload):
                    self.wait_for(lambda: self._authorize_when_told(answer, authority))
                else:
                    self._authorize(answer, authority, workload, is_fresh=True)
            case Rejection(status=status, message=message):
                raise RejectedError(message, status=status)
            case UnknownAddress(what=what):
                self.wait_for(lambda: self._fetch(authority, what, fetched))

    async def _fetch(self, authority: Authority, what: str, fetched: frozenset[str]) -> None:
        """Ask the control plane about an address, then judge the request again."""
        demand = self.context.node.demand
        assert demand is not None
        await demand.fetch(what)
        workload = await self.context.known_workload()
        if not self.is_over:
            self._classify(authority, workload, fetched | {what})

    # Room 3: authorize.

    async def _authorize_when_told(self, admission: Admission, authority: Authority) -> None:
        workload = await self.context.known_policies()
        if not self.is_over:
            self._authorize(admission, authority, workload)

    def _authorize(
        self,
        admission: Admission,
        authority: Authority,
        workload: Workload,
        *,
        is_fresh: bool = False,
    ) -> None:
        """Ask policy; the answer is remembered if the admission is of the state of now."""
        node, context = self.context.node, self.context
        flow = self._flow_to(admission)
        description = describe_admission(
            node,
            admission,
            workload=workload,
            identity=context.identity(workload),
            flow=flow,
            local=self._tunnel.facts.local,
            request=self._request,
            target=authority,
        )
        self.opened(description)
        permit = judge(node, flow, workload, self.record)
        if is_fresh:
            entrance = Entrance(admission, description, permit)
            context.entrances.keep(self._question(), node.store.version, entrance)
        self._connect(admission, permit)

    def _enter_again(self, entrance: Entrance) -> None:
        """Do as for the connection before that asked the same under the same state."""
        admission = self._admission = entrance.admission
        permit = entrance.permit
        if permit.flow is not None and permit.flow.source_endpoint is self.source:
            self.actual, self.flow = admission.destination, permit.flow  # of the same tunnel
        else:
            permit = permit_again(permit, self._flow_to(admission))
        self.opened(entrance.description)
        explain(self.context.node, permit)
        self._connect(admission, permit)

    def _flow_to(self, admission: Admission) -> Flow:
        self.actual = admission.destination
        flow = self.flow = Flow(
            source=self._tunnel.facts.peer,
            source_endpoint=self.source,
            destination=admission.destination,
        )
        return flow

    def _question(self) -> Question:
        facts, request = self._tunnel.facts, self._request
        return Question(
            facts.peer,
            self.source.ip,
            facts.local,
            request.forwarded_host,
            tuple(request.essence()),
        )

    # Room 4: connect.

    def _connect(self, admission: Admission, permit: Permit) -> None:
        source = None
        if self.context.original_source and not admission.dial.ip.is_loopback:
            source = self.source.ip
        sock = self.context.sockets.dial(permit, admission.dial, source=source)
        self._dial = Dial(self.context.node.reactor, sock, self)

    def on_connected(self, sock: Socket) -> None:
        """Say 200, send what has gathered, relay."""
        self._dial = None
        node, tunnel, stream = self.context.node, self._tunnel, self._stream
        workload = self.context.workload()
        baggage = workload if node.config.baggage_enabled else None
        tunnel.core.respond(stream, HTTPStatus.OK, response_headers(baggage))
        tunnel.flush_later()
        relay = self._relay = StreamRelay(node.reactor, sock, tunnel, stream, self.end)
        node.reactor.hand_over(sock, relay)
        if header := self._proxy_header():
            relay.preface(header)
        if early := self._take_early():
            relay.on_data(DataReceived(stream, [memoryview(early)], len(early)))
        if self._ended:
            relay.on_end()
        # Long-lived connections are many: keep of the request only what the dump shows.
        self._request = self._request.without_headers()
        self._admission = None

    def on_unreachable(self, error: UnreachableError) -> None:
        """Refuse with 503."""
        self._dial = None
        self.end(UnreachableError(f"connection failed: {error}"))

    def _proxy_header(self) -> bytes:
        admission = self._admission
        if admission is None or admission.proxy_destination is None:
            return b""
        return proxy_header(
            self.source,
            admission.proxy_destination,
            identity=self._tunnel.facts.peer,
            host=self._request.forwarded_host,
        )

    # The stream, before the relay owns it.

    def on_response(self, event: ResponseReceived) -> None:
        """Nothing: a client does not answer."""

    def on_data(self, event: DataReceived) -> None:
        """Keep what the client sends before it has our answer; windows bound each and the sum."""
        for chunk in event.chunks:
            self._early += chunk
        self._tunnel.hold(event.size)

    def _take_early(self) -> bytearray:
        early, self._early = self._early, bytearray()
        if early:
            self._tunnel.hold(-len(early))
        return early

    def on_end(self) -> None:
        """Remember that the client has finished sending."""
        self._ended = True

    def on_window(self) -> None:
        """Nothing: no data is sent before the answer."""

    def on_reset(self, code: int) -> None:
        """End: the client has given up."""
        self.end(PeerError(f"client reset the stream before it was connected (code {code})"))

    def on_lost(self, error: ZtunnelError) -> None:
        """End with the connection."""
        self.end(error)

    # The end.

    def moved(self) -> tuple[int, int]:
        """Return the bytes moved so far: from the client, from the server."""
        from_server, from_client = super().moved()  # the socket is the application's here
        return from_client, from_server

    def release(self, error: ZtunnelError | None) -> None:
        """Answer, if that has not been done; let go of the application."""
        super().release(error)
        if self._has_place:
            self.context.connections.give_back()
        if self._relay is None:
            self._stream.owner = None
            self._take_early()
            core = self._tunnel.core
            if not self._tunnel.closed and self._stream.id in core.streams:
                core.refuse(self._stream, status_of(error))
                self._tunnel.released()


def status_of(error: ZtunnelError | None) -> int:
    """Choose the status for a stream that was not connected (dataplane.md 3.3)."""
    match error:
        case RejectedError(status=status):
            return status
        case DeniedError():
            # 401, not 403: the reference answers 401 and tests rely on it.
            return HTTPStatus.UNAUTHORIZED
        case _:
            return HTTPStatus.SERVICE_UNAVAILABLE
