"""Inbound HBONE: mutual TLS on port 15008, CONNECT streams inside (dataplane.md 3).

A TLS connection costs one task until its handshake is done; then the reactor owns it, and each of
its streams is an `InboundStream` that walks through the rooms without a task, unless it must wait.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import (
    IdentityError,
    LimitError,
    PeerIdentityError,
    TlsError,
    ZtunnelError,
)
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.model.network import Endpoint
from ztunnel.proxy.inbound_stream import InboundStream
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.tls.verify import verify_client
from ztunnel.transport.handshake import secure
from ztunnel.transport.tunnel import Tunnel, TunnelFacts
from ztunnel.wire.hbone.connection import HboneConnection

if TYPE_CHECKING:
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket
    from ztunnel.wire.hbone.events import RequestReceived


class InboundTunnels:
    """The tunnels that peers have opened to one workload; their owner."""

    __slots__ = ("_context", "_draining", "_tunnels")

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self._draining = False
        self._tunnels: set[Tunnel] = set()

    def __len__(self) -> int:
        return len(self._tunnels)

    def serve(self, sock: Socket, peer: Endpoint) -> None:
        """Take an accepted connection; returns at once."""
        places = self._context.node.handshakes
        if not places.take():
            reset_on_close(sock)
            error = LimitError(f"{places.most} TLS handshakes are under way already")
            self._turn_away(sock, peer, None, error)
            return

        async def handshake() -> None:
            try:
                await self._shake_hands(sock, peer)
            finally:
                places.give_back()

        self._context.spawn(handshake)

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

    # Tunnels call these.

    def on_settings(self, tunnel: Tunnel) -> None:
        """Nothing: a server need not wait for them."""

    def on_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """Serve a stream."""
        InboundStream(self._context, tunnel, request).serve()

    def on_goaway(self, tunnel: Tunnel) -> None:
        """Nothing: the client closes when it is done."""

    def on_released(self, tunnel: Tunnel) -> None:
        """Nothing: clients decide how long an idle tunnel lives."""

    def on_closed(self, tunnel: Tunnel, error: ZtunnelError | None) -> None:  # noqa: ARG002
        """Forget the tunnel."""
        self._tunnels.discard(tunnel)

    async def _shake_hands(self, sock: Socket, peer: Endpoint) -> None:
        local: Endpoint | None = None
        try:
            local = Endpoint.of(sock.getsockname())
            seconds = self._context.node.config.tls_handshake_seconds
            with trio.move_on_after(seconds) as scope:
                tunnel, leftover = await self._establish(sock, peer, local)
            if scope.cancelled_caught:
                error = TlsError(f"tls handshake error: not finished within {seconds:g}s")
                self._turn_away(sock, peer, local, error)
                return
        except ZtunnelError as error:
            self._turn_away(sock, peer, local, error)
        except OSError as error:
            failure = TlsError(f"tls handshake error: {error.strerror}")
            self._turn_away(sock, peer, local, failure)
        except BaseException:
            sock.close()
            raise
        else:
            self._tunnels.add(tunnel)
            tunnel.start(leftover)
            if self._draining:
                tunnel.drain()

    async def _establish(
        self, sock: Socket, peer: Endpoint, local: Endpoint
    ) -> tuple[Tunnel, bytes]:
        node = self._context.node
        self._context.sockets.tune(sock)
        workload = await self._context.known_workload()
        own = self._context.identity(workload)
        try:
            certificate = await node.certificates.certificate_for(own)
        except IdentityError as error:
            raise IdentityError(f"signing error: {error}") from error
        established = await secure(sock, node.tls.server(certificate), server_side=True)
        domains = () if certificate.identity is None else (certificate.identity.trust_domain,)
        try:
            identity = verify_client(established.peer, domains)
        except PeerIdentityError as error:
            if error.code is not None:
                with contextlib.suppress(OSError):
                    sock.send(established.records.alert(error.code))
            raise
        facts = TunnelFacts(
            local=local,
            remote=peer,
            peer=identity,
            peer_not_after=established.peer.not_after,
            certificate=certificate,
            cipher=established.cipher,
            version=established.version,
        )
        core = HboneConnection(client=False, settings=node.server_settings)
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
