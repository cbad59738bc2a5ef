"""One connection to a pod's HBONE port, from accept until it is a tunnel, or is turned away.

It costs no task: the reactor carries the handshake. Only while our own workload or its certificate
is not known yet does a task wait for that. Every outcome, also the end of the pod, comes once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

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
from ztunnel.model.network import Endpoint
from ztunnel.proxy.connection import InternalError
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter
from ztunnel.tls.handshake import Handshake
from ztunnel.tls.verify import verify_client
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.owners import TunnelOwner
from ztunnel.transport.securing import Securing, refuse
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection, HboneLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.model.identity import Identity
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.tls.certificate import WorkloadCertificate
    from ztunnel.tls.handshake import Established
    from ztunnel.transport.sockets import Socket
    from ztunnel.wire.hbone.settings import HboneSettings

log = get("proxy")


class Host(TunnelOwner, Protocol):
    """Who takes tunnels in."""

    def on_greeted(
        self, greeting: Greeting, tunnel: Tunnel, leftover: bytes, unsent: bytes
    ) -> None:
        """Own a new tunnel and start it with what came behind the handshake, and what has to go."""

    def on_turned_away(self, greeting: Greeting, error: ZtunnelError) -> None:
        """Learn why there is none; the socket is closed."""


class Greeting:
    """One handshake of a peer's."""

    __slots__ = (
        "_certificate",
        "_context",
        "_deadline",
        "_host",
        "_securing",
        "_sock",
        "_started",
        "_waiting",
        "is_over",
        "local",
        "peer",
    )

    def __init__(self, context: ProxyContext, host: Host, sock: Socket, peer: Endpoint) -> None:
        self._context = context
        self._host = host
        self._sock = sock
        self.peer = peer
        self.local: Endpoint | None = None
        self.is_over = False
        self._certificate: WorkloadCertificate | None = None
        self._securing: Securing | None = None
        self._started = 0.0
        self._waiting: trio.CancelScope | None = None
        seconds = context.node.config.tls_handshake_seconds
        self._deadline = context.node.reactor.deadline(seconds, self._too_late)

    def start(self) -> None:
        """Begin; returns at once."""
        self._attempt(self._begin)

    def drop(self) -> None:
        """Forget it before it has begun: there is no place; the socket stays the caller's."""
        self._conclude()

    def give_way(self) -> None:
        """End, as another peer needs the place."""
        text = "a TLS handshake gave way to one of an address that has fewer"
        self.end(LimitError(text))

    def end(self, error: ZtunnelError) -> None:
        """Turn the peer away; does nothing if it has been let in or turned away."""
        if self.is_over:
            return
        self._conclude()
        if self._securing is not None:
            self._securing.cancel()
        self._context.node.reactor.forget(self._sock)
        self._sock.close()
        if isinstance(error, RevokedError):
            self._context.node.metrics.crl_rejections.count(Reporter.DESTINATION).add(1)
        self._host.on_turned_away(self, error)

    # The handshake tells how it went.

    def on_secured(self, established: Established, unsent: bytes) -> None:
        """Ask who it is, and make a tunnel."""
        self._attempt(lambda: self._let_in(established, unsent))

    def on_insecure(self, error: Exception) -> None:
        """Turn the peer away."""
        self._attempt(lambda: _raise(error))

    def _begin(self) -> None:
        self.local = Endpoint.of(self._sock.getsockname())
        workload = self._context.workload()
        certificate = None
        if workload is not None:
            identity = self._context.identity(workload)
            certificate = self._context.node.certificates.cached(identity)
        if certificate is None:
            self._context.spawn(self._wait)
        else:
            self._secure(certificate)

    async def _wait(self) -> None:
        """Wait until we know who we are and can prove it."""
        self._waiting = trio.CancelScope()
        try:
            with self._waiting:
                workload = await self._context.known_workload()
                certificate = await self._certificate_for(self._context.identity(workload))
                self._attempt(lambda: self._secure(certificate))
        except trio.Cancelled:
            self.end(DrainError("connection closed due to connection drain"))
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one connection: it ends alone
            self.on_insecure(error)

    async def _certificate_for(self, identity: Identity) -> WorkloadCertificate:
        try:
            return await self._context.node.certificates.certificate_for(identity)
        except IdentityError as error:
            raise IdentityError(f"signing error: {error}") from error

    def _secure(self, certificate: WorkloadCertificate) -> None:
        if self.is_over:
            return
        node = self._context.node
        self._certificate = certificate
        self._started = trio.current_time()
        handshake = Handshake(node.tls.server(certificate), server_side=True)
        self._securing = Securing(node.reactor, self._sock, handshake, self)
        self._securing.start()

    def _let_in(self, established: Established, unsent: bytes) -> None:
        node, certificate, local = self._context.node, self._certificate, self.local
        assert certificate is not None
        assert local is not None
        seconds = trio.current_time() - self._started
        node.metrics.handshake_seconds.histogram(Reporter.DESTINATION).observe(seconds)
        domains = certificate.trust_domains
        if domains:
            domains += node.config.trust_domain_aliases
        try:
            identity = verify_client(established.peer, domains)
        except PeerIdentityError as error:
            refuse(self._sock, established, error, unsent)
            raise
        facts = TunnelFacts(
            local=local,
            remote=self.peer,
            peer=identity,
            peer_not_after=established.peer.not_after,
            certificate=certificate,
            cipher=established.cipher,
            version=established.version,
            peer_links=established.peer.links,
        )
        settings = node.server_settings
        core = HboneConnection(client=False, settings=settings, limits=_limits(settings))
        tunnel = Tunnel(node.reactor, self._sock, established.records, core, self._host, facts)
        self._conclude()
        self._host.on_greeted(self, tunnel, established.leftover, unsent)

    def _too_late(self) -> None:
        seconds = self._context.node.config.tls_handshake_seconds
        self.end(TlsError(f"tls handshake error: not finished within {seconds:g}s"))

    def _conclude(self) -> None:
        self.is_over = True
        self._deadline.cancel()
        if self._waiting is not None:
            self._waiting.cancel()

    def _attempt(self, step: Callable[[], None]) -> None:
        """Take a step that does not wait; its failure turns the peer away."""
        try:
            step()
        except ZtunnelError as error:
            self.end(error)
        except OSError as error:
            self.end(TlsError(f"tls handshake error: {error.strerror}"))
        except Exception as error:  # the boundary of one connection: it ends alone
            log.exception("handshake failed unexpectedly")
            self.end(InternalError(f"internal error: {error}"))


def _raise(error: Exception) -> None:
    raise error


@lru_cache(maxsize=1)  # all tunnels of a node share them
def _limits(settings: HboneSettings) -> HboneLimits:
    # Peers that have not read our settings yet may be over them in good faith.
    return HboneLimits(max_streams=2 * settings.max_concurrent_streams)
