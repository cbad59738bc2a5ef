"""Dialling a tunnel for one workload's pool: certificate, socket, `Raising`, and what is counted.

It costs no task, but while the certificate is not there yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.errors import DrainError, RevokedError, TlsError
from ztunnel.proxy.certificates import count_untracked, refuse_expired
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.secure_dial import Plan, Raising

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.tls.certificate import WorkloadCertificate
    from ztunnel.transport.attempt import Attempt
    from ztunnel.transport.pool import PoolKey
    from ztunnel.transport.tunnel import Tunnel


class TunnelDialling:
    """One dial for a pool; ends in one call to its attempt, or in `cancel`."""

    __slots__ = ("_attempt", "_context", "_is_cancelled", "_key", "_permit", "_raising")

    def __init__(
        self, context: ProxyContext, key: PoolKey, permit: Permit, attempt: Attempt
    ) -> None:
        self._context = context
        self._key = key
        self._permit = permit
        self._attempt = attempt
        self._raising: Raising | None = None
        self._is_cancelled = False

    def start(self) -> None:
        """Begin; returns at once.

        Raises:
            ZtunnelError | OSError: it cannot even begin.
        """
        certificate = self._context.node.certificates.cached(self._key.source)
        if certificate is None:
            self._context.spawn(self._wait)
        else:
            self._connect(certificate)

    def cancel(self) -> None:
        """Give up without telling."""
        self._is_cancelled = True
        if self._raising is not None:
            self._raising.cancel()

    # The tunnel to be tells how it went.

    def on_raised(self, tunnel: Tunnel, seconds: float) -> None:
        """Count it and hand it over."""
        node = self._context.node
        node.metrics.handshake_seconds.histogram(Reporter.SOURCE).observe(seconds)
        node.metrics.tunnels.count(Reporter.SOURCE).add(1)
        count_untracked(node, tunnel, Reporter.SOURCE)
        try:
            refuse_expired(node, tunnel)
        except TlsError as error:
            self._attempt.on_no_tunnel(error)
        else:
            self._attempt.on_tunnel(tunnel)

    def on_not_raised(self, error: Exception) -> None:
        """Count what was revoked, and tell."""
        if isinstance(error, RevokedError):
            self._context.node.metrics.crl_rejections.count(Reporter.SOURCE).add(1)
        self._attempt.on_no_tunnel(error)

    async def _wait(self) -> None:
        """Go on when the certificate is there."""
        try:
            source = self._key.source
            certificate = await self._context.node.certificates.certificate_for(source)
            if not self._is_cancelled:
                self._connect(certificate)
        except trio.Cancelled:
            self._attempt.on_no_tunnel(DrainError("pool draining"))
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one dial
            self._attempt.on_no_tunnel(error)

    def _connect(self, certificate: WorkloadCertificate) -> None:
        context, key = self._context, self._key
        node = context.node
        plan = Plan(
            reactor=node.reactor,
            context=node.tls.client(certificate),
            expected=key.expected,
            owner=self._attempt.pool,
            settings=node.client_settings,
            remote=key.peer,
        )
        sock = context.sockets.dial(self._permit, key.peer)
        self._raising = Raising(plan, sock, self)
        self._raising.connect()
