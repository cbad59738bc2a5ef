"""Getting a stream that the peer has answered with 200: outbound, before the relay (2.8, 6.4).

Neither a usable tunnel in the pool costs a task, nor waiting for the dial that everybody who wants
that tunnel shares. What is provably safe is tried once more (dataplane.md 17.6): a stream the peer
refused or lost before it answered, and another endpoint when the dial failed. A hop of two tunnels
opens the inner one through the stream of the outer.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.errors import (
    ConnectRefusedError,
    LimitError,
    RemoteDeniedError,
    RemoteUnreachableError,
    TunnelError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.proxy.double import InnerConnection
from ztunnel.proxy.requests import request_head, tunnel_request
from ztunnel.transport.pool import PoolKey
from ztunnel.wire.headers import new_traceparent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.decide.authorize import Permit
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.proxy.ways import Way
    from ztunnel.transport.deadlines import Deadline
    from ztunnel.transport.pool import Pool
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import DataReceived, ResponseReceived
    from ztunnel.wire.hbone.stream import Stream

# What the reference's flag `CONNECT` lumps together (dataplane.md 17.35).
REFUSALS: dict[int, type[ConnectRefusedError]] = {
    HTTPStatus.UNAUTHORIZED: RemoteDeniedError,
    HTTPStatus.SERVICE_UNAVAILABLE: RemoteUnreachableError,
}
TROUBLE = "io error"
H2_CANCEL = 8
H2_REFUSED_STREAM = 7


class Opener(Protocol):
    """Who wants the stream."""

    @property
    def context(self) -> ProxyContext:
        """What the connection may use."""

    @property
    def source(self) -> Endpoint:
        """For whom the stream is."""

    def attempt(self, step: Callable[[], None], *, trouble: str) -> None:
        """Take a step that does not wait; its failure ends the connection."""

    def wait_for(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` in a task of its own; its failure ends the connection."""

    def another_hop(self, failed: Hop) -> Hop | None:
        """Give another endpoint of the same service, if there is one."""

    def on_reached(
        self, tunnel: Tunnel, stream: Stream, event: ResponseReceived, far: Identity | None
    ) -> None:
        """Take the answered stream; `far` is who answered in the inner of two tunnels."""

    def end(self, error: ZtunnelError) -> None:
        """Give up."""


class StreamOpening:
    """One attempt to get a stream; its owner until it is answered."""

    __slots__ = (
        "_deadline",
        "_done",
        "_hop",
        "_inner",
        "_may_retry",
        "_opener",
        "_permit",
        "_pool",
        "_stream",
        "_traceparent",
        "_tunnel",
        "_way",
        "_workload",
    )

    def __init__(
        self, opener: Opener, pool: Pool, *, workload: Workload, way: Way, permit: Permit
    ) -> None:
        self._opener = opener
        self._pool = pool
        self._workload = workload
        self._way = way
        self._hop = way.hop
        self._permit = permit
        self._traceparent = new_traceparent(opener.context.node.rng)
        self._tunnel: Tunnel | None = None
        self._stream: Stream | None = None
        self._inner: InnerConnection | None = None
        self._deadline: Deadline | None = None
        self._may_retry = True
        self._done = False

    def start(self) -> None:
        """Begin; returns at once."""
        opener = self._opener
        way = self._way
        key = way.key
        if key is None or way.hop is not self._hop:
            identity = opener.context.identity(self._workload)
            key = PoolKey(identity, self._hop.expected, self._hop.peer, opener.source.ip)
            way.key = key if way.hop is self._hop else None
        tunnel = self._pool.get(key, self._permit)
        if tunnel is not None:
            self._open(tunnel)
        else:
            self._pool.request(key, self._permit, self)

    def give_up(self) -> None:
        """Let go of everything; nobody is told."""
        self._done = True
        self._cancel_deadline()
        if self._stream is not None and self._tunnel is not None:
            self._stream.owner = None
            self._tunnel.core.reset(self._stream, H2_CANCEL)
            self._tunnel.released()
            self._stream = None
        if self._inner is not None:
            self._inner.close()

    # The pool tells what came of a dial.

    def on_tunnel(self, tunnel: Tunnel) -> None:
        """Open the stream."""
        self._opener.context.feedback.outliers.reached(self._hop.peer)
        if not self._done:
            self._opener.attempt(lambda: self._open(tunnel), trouble=TROUBLE)

    def on_no_tunnel(self, error: ZtunnelError) -> None:
        """Try another endpoint, if there is one and nobody answered here."""
        self._opener.attempt(lambda: self._go_elsewhere(error), trouble=TROUBLE)

    def _go_elsewhere(self, error: ZtunnelError) -> None:
        if not isinstance(error, UnreachableError):
            raise error
        opener = self._opener
        opener.context.feedback.outliers.failed(self._hop.peer, trio.current_time())
        other = opener.another_hop(self._hop) if self._may_retry else None
        if self._done or other is None:
            raise error
        self._may_retry = False
        self._hop = other
        self.start()

    def _open(self, tunnel: Tunnel) -> None:
        opener, hop = self._opener, self._hop
        config = opener.context.node.config
        assert hop.authority is not None
        way = self._way
        head = way.head if way.hop is hop else None
        if head is None:
            head = request_head(hop.authority, self._workload)
            way.head = head if way.hop is hop else None
        headers = tunnel_request(
            head,
            source=opener.source,
            service=hop.service,
            traceparent=self._traceparent,
            network=None if self._inner is None else config.network,
        )
        try:
            stream = tunnel.open(headers, self)
        except LimitError:
            # The tunnel filled up or began to drain since it was chosen; the pool knows better now.
            self._retry(LimitError("no tunnel takes a further stream"))
            return
        self._tunnel, self._stream = tunnel, stream
        reactor = opener.context.node.reactor
        self._deadline = reactor.deadline(config.connect_response_seconds, self._on_no_answer)

    async def _go_inside(self, outer: Tunnel, stream: Stream) -> None:
        """Take over the outer stream, unless the gateway has thought better of it by now."""
        if not self._done:
            inner = InnerConnection(self._opener.context.node, self._fail)
            near = inner.join(outer, stream)
            self._stream = None
            self._inner = inner
            await self._open_inner(near)

    async def _open_inner(self, near: Socket) -> None:
        """Run the inner connection of a double tunnel through the outer stream."""
        assert self._inner is not None
        identity = self._opener.context.identity(self._workload)
        await self._inner.establish(near, self._hop.inner_expected, identity)
        inner = self._inner.tunnel
        if not self._done and inner is not None:
            self._open(inner)

    # The stream tells how the CONNECT went.

    def on_response(self, event: ResponseReceived) -> None:
        """Hand the stream over when the peer says 200, else end with its status."""
        if event.status != HTTPStatus.OK:
            self._fail(refused(event.status))
            return
        tunnel, stream = self._tunnel, self._stream
        assert tunnel is not None
        assert stream is not None
        self._cancel_deadline()
        # A yes that is taken back is no reason to ask again: part of us is at work on it already.
        self._may_retry = False
        if self._hop.protocol is HopProtocol.DOUBLE_HBONE and self._inner is None:
            if event.ended:
                self.on_end()
            else:  # the stream stays ours to reset until the inner connection takes it
                self._opener.wait_for(lambda: self._go_inside(tunnel, stream))
            return
        self._stream = None
        far = None if self._inner is None else self._inner.peer
        self._opener.on_reached(tunnel, stream, event, far)

    def on_data(self, event: DataReceived) -> None:  # noqa: ARG002 - nobody is there to read it
        """End: only the outer of two streams is still ours when answered, and we speak first."""
        self._fail(TunnelError("h2 failed: the gateway speaks before it is spoken to"))

    def on_end(self) -> None:
        """End: a stream that ends here opened nothing."""
        self._fail(TunnelError("h2 failed: the peer ended the stream instead of opening it"))

    def on_window(self) -> None:
        """Nothing: no data is sent before the answer."""

    def on_reset(self, code: int) -> None:
        """Try once more if the peer says that it did nothing with the stream."""
        self._stream = None
        error = TunnelError(f"h2 failed: stream reset by the peer (code {code})", code=code)
        if code == H2_REFUSED_STREAM:
            self._retry(error)
        else:
            self._fail(error)

    def on_lost(self, error: ZtunnelError) -> None:
        """Try once more: nothing of the application has been sent yet."""
        self._stream = None
        self._retry(error)

    def _retry(self, error: ZtunnelError) -> None:
        self._cancel_deadline()
        if self._done:
            return
        if not self._may_retry or self._inner is not None:
            self._fail(error)
            return
        self._may_retry = False
        self.start()

    def _fail(self, error: ZtunnelError) -> None:
        if not self._done:
            self._opener.end(error)

    def _on_no_answer(self) -> None:
        seconds = self._opener.context.node.config.connect_response_seconds
        self._fail(UnreachableError(f"no answer to CONNECT from the peer within {seconds:g}s"))

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
    kind = REFUSALS.get(status, ConnectRefusedError)
    return kind(f"http status: {status}{phrase}", status=status)
