"""Inbound HBONE: mutual TLS on port 15008, CONNECT streams inside (dataplane.md 3).

A TLS connection is a `Greeting` until its handshake is done, then a tunnel; the reactor owns both.
Each stream is an `InboundStream` that walks through the rooms without a task, unless it must wait.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import IdentityError, LimitError, ZtunnelError
from ztunnel.identity.manager import Standing
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.proxy.certificates import count_untracked
from ztunnel.proxy.connection import refuse_early
from ztunnel.proxy.greeting import Greeting
from ztunnel.proxy.inbound_stream import InboundStream
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.traffic import Reporter

if TYPE_CHECKING:
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import RequestReceived


class InboundTunnels:
    """The tunnels that peers have opened to one workload; their owner."""

    __slots__ = ("_context", "_draining", "_greetings", "_of_peer", "_tunnels")

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self._draining = False
        self._tunnels: set[Tunnel] = set()
        self._greetings: dict[Greeting, None] = {}  # what may become a tunnel
        self._of_peer: Counter[IpAddress] = Counter()  # also those still shaking hands

    def __len__(self) -> int:
        return len(self._tunnels)

    def serve(self, sock: Socket, peer: Endpoint) -> None:
        """Take an accepted connection; returns at once."""
        handshakes = self._context.node.handshakes
        problem = self._too_many(peer)
        if problem is None:
            greeting = Greeting(self._context, self, sock, peer)
            if handshakes.begin(peer.ip, greeting):
                self._of_peer[peer.ip] += 1
                self._context.node.metrics.sockets_open(Reporter.DESTINATION).add(1)
                self._greetings[greeting] = None
                greeting.start()
                return
            greeting.drop()
            problem = LimitError(f"{handshakes.most} TLS handshakes are under way already")
        reset_on_close(sock)
        sock.close()
        self._conclude(peer, None, problem)

    def _too_many(self, peer: Endpoint) -> LimitError | None:
        """Say so if one address has more connections to this pod than it may."""
        most = self._context.node.config.max_tunnels_per_peer
        if not most or self._of_peer[peer.ip] < most:
            return None
        self._context.node.metrics.limits_reached.count("connections_per_peer").add(1)
        return LimitError(f"{peer.ip} has {most} HBONE connections to this pod already")

    def _forget(self, ip: IpAddress) -> None:
        self._context.node.metrics.sockets_open(Reporter.DESTINATION).add(-1)
        self._of_peer[ip] -= 1
        if not self._of_peer[ip]:
            del self._of_peer[ip]

    def drain(self) -> None:
        """Tell every peer in two steps; each tunnel closes after its last stream."""
        self._draining = True
        for tunnel in list(self._tunnels):
            tunnel.drain()

    def close(self, error: ZtunnelError) -> None:
        """Close every tunnel now, and whatever was to become one."""
        self._draining = True
        for greeting in list(self._greetings):
            greeting.end(error)
        for tunnel in list(self._tunnels):
            tunnel.close(error)

    def all(self) -> list[Tunnel]:
        """List the tunnels."""
        return list(self._tunnels)

    def drain_old(self) -> None:
        """Have peers leave tunnels with certificates that have expired or been renewed since."""
        for tunnel in list(self._tunnels):
            if self._standing(tunnel) is not Standing.CURRENT:
                tunnel.drain()

    # Tunnels call these.

    def on_settings(self, tunnel: Tunnel) -> None:
        """Nothing: a server need not wait for them."""

    def on_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """Serve a stream, unless the certificates of the tunnel have expired."""
        stream = InboundStream(self._context, tunnel, request)
        standing = self._standing(tunnel)
        if standing is Standing.EXPIRED:
            stream.end(IdentityError("a certificate of this HBONE connection has expired"))
        else:
            stream.serve()
        if standing is not Standing.CURRENT:
            tunnel.drain()

    def on_goaway(self, tunnel: Tunnel) -> None:
        """Nothing: the client closes when it is done."""

    def on_released(self, tunnel: Tunnel) -> None:
        """Nothing: clients decide how long an idle tunnel lives."""

    def on_closed(self, tunnel: Tunnel, error: ZtunnelError | None) -> None:  # noqa: ARG002
        """Forget the tunnel."""
        self._tunnels.discard(tunnel)
        self._context.node.metrics.tunnels.count(Reporter.DESTINATION).add(-1)
        self._forget(tunnel.facts.remote.ip)

    def _standing(self, tunnel: Tunnel) -> Standing:
        facts = tunnel.facts
        certificates = self._context.node.certificates
        return certificates.standing(facts.certificate, facts.peer_not_after)

    # Greetings call these.

    def on_greeted(
        self, greeting: Greeting, tunnel: Tunnel, leftover: bytes, unsent: bytes
    ) -> None:
        """Take a new tunnel in."""
        self._end_of(greeting)
        self._tunnels.add(tunnel)
        self._context.node.metrics.tunnels.count(Reporter.DESTINATION).add(1)
        count_untracked(self._context.node, tunnel, Reporter.DESTINATION)
        tunnel.start(leftover, unsent)
        if self._draining:
            tunnel.drain()

    def on_turned_away(self, greeting: Greeting, error: ZtunnelError) -> None:
        """Say so."""
        self._end_of(greeting)
        self._forget(greeting.peer.ip)
        self._conclude(greeting.peer, greeting.local, error)

    def _end_of(self, greeting: Greeting) -> None:
        self._context.node.handshakes.end(greeting)
        del self._greetings[greeting]

    def _conclude(self, peer: Endpoint, local: Endpoint | None, error: ZtunnelError) -> None:
        now = trio.current_time()
        record = Record(
            log=self._context.node.access_log,
            direction=Direction.INBOUND,
            source=peer,
            started=now,
            destination=local,
        )
        record.finish(now, error)
        refuse_early(self._context.node, Direction.INBOUND, error)
