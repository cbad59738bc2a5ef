"""Inbound HBONE: mutual TLS on port 15008, CONNECT streams inside (dataplane.md 3).

A TLS connection costs one task until its handshake is done; then the reactor owns it, and each of
its streams is an `InboundStream` that walks through the rooms without a task, unless it must wait.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import (
    DrainError,
    IdentityError,
    LimitError,
    PeerIdentityError,
    RevokedError,
    TlsError,
    ZtunnelError,
)
from ztunnel.identity.manager import Standing
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.model.network import Endpoint
from ztunnel.proxy.certificates import count_untracked
from ztunnel.proxy.connection import InternalError, refuse_early
from ztunnel.proxy.inbound_stream import InboundStream
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter
from ztunnel.tls.verify import verify_client
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.handshake import refuse, secure
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection, HboneLimits

if TYPE_CHECKING:
    from ztunnel.model.network import IpAddress
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket
    from ztunnel.wire.hbone.events import RequestReceived

log = get("proxy")


class InboundTunnels:
    """The tunnels that peers have opened to one workload; their owner."""

    __slots__ = ("_context", "_draining", "_of_peer", "_tunnels")

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self._draining = False
        self._tunnels: set[Tunnel] = set()
        self._of_peer: Counter[IpAddress] = Counter()  # also those still shaking hands

    def __len__(self) -> int:
        return len(self._tunnels)

    def serve(self, sock: Socket, peer: Endpoint) -> None:
        """Take an accepted connection; returns at once."""
        handshakes = self._context.node.handshakes
        seconds = self._context.node.config.tls_handshake_seconds
        problem = self._too_many(peer)
        scope = None if problem else handshakes.begin(peer.ip, seconds=seconds)
        if scope is None:
            reset_on_close(sock)
            text = f"{handshakes.most} TLS handshakes are under way already"
            self._turn_away(sock, peer, None, problem or LimitError(text))
            return
        self._of_peer[peer.ip] += 1
        self._context.node.metrics.sockets_open(Reporter.DESTINATION).add(1)

        async def handshake() -> None:
            stands = False
            try:
                stands = await self._shake_hands(sock, peer, scope)
            finally:
                handshakes.end(scope)
                if not stands:
                    self._forget(peer.ip)

        self._context.spawn(handshake)

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
        """Close every tunnel now."""
        self._draining = True
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

    async def _shake_hands(self, sock: Socket, peer: Endpoint, scope: trio.CancelScope) -> bool:
        """Make a tunnel of the connection; say whether it stands now."""
        local: Endpoint | None = None
        try:
            local = Endpoint.of(sock.getsockname())
            with scope:
                tunnel, leftover = await self._establish(sock, peer, local)
            if scope.cancelled_caught:
                self._turn_away(sock, peer, local, self._cut_short(scope))
                return False
        except RevokedError as error:
            self._context.node.metrics.crl_rejections.count(Reporter.DESTINATION).add(1)
            self._turn_away(sock, peer, local, error)
        except ZtunnelError as error:
            self._turn_away(sock, peer, local, error)
        except OSError as error:
            failure = TlsError(f"tls handshake error: {error.strerror}")
            self._turn_away(sock, peer, local, failure)
        except trio.Cancelled:
            drained = DrainError("connection closed due to connection drain")
            self._turn_away(sock, peer, local, drained)
            raise
        except Exception as error:  # the boundary of one connection: it ends alone
            log.exception("handshake failed unexpectedly")
            self._turn_away(sock, peer, local, InternalError(f"internal error: {error}"))
        else:
            self._tunnels.add(tunnel)
            self._context.node.metrics.tunnels.count(Reporter.DESTINATION).add(1)
            count_untracked(self._context.node, tunnel, Reporter.DESTINATION)
            tunnel.start(leftover)
            if self._draining:
                tunnel.drain()
            return True
        return False

    def _cut_short(self, scope: trio.CancelScope) -> ZtunnelError:
        """Say why a handshake was ended: it took too long, or the place was needed."""
        if trio.current_time() < scope.deadline:
            return LimitError("a TLS handshake gave way to one of an address that has fewer")
        seconds = self._context.node.config.tls_handshake_seconds
        return TlsError(f"tls handshake error: not finished within {seconds:g}s")

    async def _establish(
        self, sock: Socket, peer: Endpoint, local: Endpoint
    ) -> tuple[Tunnel, bytes]:
        node = self._context.node
        workload = await self._context.known_workload()
        own = self._context.identity(workload)
        try:
            certificate = await node.certificates.certificate_for(own)
        except IdentityError as error:
            raise IdentityError(f"signing error: {error}") from error
        started = trio.current_time()
        established = await secure(sock, node.tls.server(certificate), server_side=True)
        seconds = trio.current_time() - started
        node.metrics.handshake_seconds.histogram(Reporter.DESTINATION).observe(seconds)
        domains = certificate.trust_domains
        if domains:
            domains += node.config.trust_domain_aliases
        try:
            identity = verify_client(established.peer, domains)
        except PeerIdentityError as error:
            refuse(sock, established, error)
            raise
        facts = TunnelFacts(
            local=local,
            remote=peer,
            peer=identity,
            peer_not_after=established.peer.not_after,
            certificate=certificate,
            cipher=established.cipher,
            version=established.version,
            peer_links=established.peer.links,
        )
        settings = node.server_settings
        # Peers that have not read our settings yet may be over them in good faith.
        limits = HboneLimits(max_streams=2 * settings.max_concurrent_streams)
        core = HboneConnection(client=False, settings=settings, limits=limits)
        tunnel = Tunnel(node.reactor, sock, established.records, core, self, facts)
        return tunnel, established.leftover

    def _turn_away(
        self, sock: Socket, peer: Endpoint, local: Endpoint | None, error: ZtunnelError
    ) -> None:
        sock.close()
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
