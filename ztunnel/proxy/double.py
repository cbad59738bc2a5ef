"""A tunnel within a tunnel, to cross an east-west gateway (dataplane.md 2.8, double HBONE).

How it works: the outer stream is joined to one end of a socket pair; the inner connection runs on
the other end like any other: TLS, identity check, HTTP/2. So a tunnel within a tunnel needs no code
of its own in the data path. The inner connection serves one application connection and is not
pooled, so that the far gateway balances each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.errors import PeerError, RevokedError, TlsError, ZtunnelError
from ztunnel.proxy.certificates import watch_for_revocation
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.secure_dial import Plan, raise_tunnel
from ztunnel.transport.sockets import local_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.model.identity import Identity
    from ztunnel.proxy.context import NodeContext
    from ztunnel.transport.owners import StreamOwner
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import Headers, RequestReceived
    from ztunnel.wire.hbone.stream import Stream

H2_PROTOCOL_ERROR = 1
LINGER_SECONDS = 5.0  # how long a gateway may take to end the outer stream after the inner one


class InnerConnection:
    """The inner connection of one double tunnel; also its tunnel's owner."""

    __slots__ = ("_failed", "_node", "_outer", "_stop_watching", "_tunnel")

    def __init__(self, node: NodeContext, failed: Callable[[ZtunnelError], None]) -> None:
        """Make one; `failed` is called once if the outer or inner connection ends before `open`."""
        self._node = node
        self._failed = failed
        self._outer: StreamRelay | None = None
        self._tunnel: Tunnel | None = None
        self._stop_watching: Callable[[], None] = lambda: None

    @property
    def peer(self) -> Identity | None:
        """Who answered inside."""
        return None if self._tunnel is None else self._tunnel.facts.peer

    @property
    def tunnel(self) -> Tunnel | None:
        """The inner tunnel, once it stands."""
        return self._tunnel

    def join(self, outer: Tunnel, stream: Stream) -> Socket:
        """Take over the outer stream, whose answer was 200; give the end to speak through it.

        Raises:
            OSError: out of descriptors; the stream stays the caller's.
        """
        node = self._node
        near, far = local_pair()
        relay = self._outer = StreamRelay(node.reactor, far, outer, stream, self._on_outer_end)
        node.reactor.register(far, relay)
        return near

    async def establish(
        self, near: Socket, expected: tuple[Identity, ...], source: Identity
    ) -> None:
        """Shake hands through what `join` gave.

        Raises:
            ZtunnelError: the handshake failed or somebody else answered.
        """
        node = self._node
        seconds = node.config.tls_handshake_seconds
        try:
            context = node.tls.client(await node.certificates.certificate_for(source))
        except BaseException:
            near.close()
            raise
        with trio.move_on_after(seconds) as scope:
            try:
                plan = Plan(
                    reactor=node.reactor,
                    context=context,
                    expected=expected,
                    owner=self,
                    settings=node.client_settings,
                )
                tunnel = self._tunnel = await raise_tunnel(plan, near)
            except RevokedError:
                node.metrics.crl_rejections.count(Reporter.SOURCE).add(1)
                raise
            self._stop_watching = watch_for_revocation(node, tunnel)
        if scope.cancelled_caught:
            near.close()
            raise TlsError(f"tls handshake error: inner one not finished within {seconds:g}s")

    def open(self, headers: Headers, owner: StreamOwner) -> Stream:
        """Send the inner request.

        Raises:
            LimitError: the connection has ended meanwhile.
        """
        assert self._tunnel is not None
        return self._tunnel.open(headers, owner)

    def close(self) -> None:
        """End both connections' part in this; the outer connection stays pooled."""
        if self._tunnel is not None:
            self._tunnel.close()
        elif self._outer is not None:
            self._outer.cut(PeerError("the inner connection was given up"))

    # The inner tunnel calls these.

    def on_settings(self, tunnel: Tunnel) -> None:
        """Nothing: the request has been sent without waiting for them."""

    def on_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """Refuse: a server does not open streams (RFC 9113 s8.4)."""
        tunnel.core.reset(request.stream, H2_PROTOCOL_ERROR)
        tunnel.flush_later()

    def on_goaway(self, tunnel: Tunnel) -> None:
        """Nothing: the one stream lives on."""

    def on_released(self, tunnel: Tunnel) -> None:
        """Close when the one stream has ended."""
        self._node.reactor.soon(tunnel.close)

    def on_closed(self, tunnel: Tunnel, error: ZtunnelError | None) -> None:  # noqa: ARG002
        """Watch no more; the stream's owner is told by the tunnel.

        The outer stream ends in good order behind our last words; a gateway that does not end its
        side would keep it, and a socket of ours, for ever.
        """
        self._stop_watching()
        outer = self._outer
        if outer is not None:
            gone = PeerError("the gateway did not end the outer tunnel")
            self._node.reactor.deadline(LINGER_SECONDS, lambda: outer.cut(gone))

    def _on_outer_end(self, error: ZtunnelError | None) -> None:
        if self._tunnel is None:
            self._failed(error or PeerError("the gateway closed the outer tunnel"))
