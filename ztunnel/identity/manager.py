"""One certificate per identity: fetched once for everybody, renewed in time (dataplane.md 8.4)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from random import Random
from typing import Protocol

import structlog
import trio

from ztunnel.errors import IdentityError, ZtunnelError
from ztunnel.identity.rotation import CertificateState, CertificateStatus, Rotation, Urgency
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

log = structlog.get_logger()

# The reference sets no limit, so a CA call that hangs keeps one of its eight places for ever.
ISSUE_SECONDS = 30.0
# How long a connection waits; below the 10 s a handshake may take, so that the error tells why.
WAIT_SECONDS = 8.0
# Renewal times are wall clock, sleeping is not: look again at least this often.
NAP_SECONDS_MAX = 60.0


class CertificateIssuer(Protocol):
    """Whoever can make certificates: a CA client, or an authority in this process.

    Its `str` is what error texts call it.
    """

    async def issue(self, identity: Identity) -> WorkloadCertificate:
        """Get a certificate with a fresh key.

        Raises:
            ZtunnelError: there is none; the message says why.
        """


class Standing(Enum):
    """Whether a tunnel may carry further streams, judged by the certificates of its handshake."""

    CURRENT = auto()
    ROTATED = auto()  # there is a newer certificate, or the identity was forgotten: use another
    EXPIRED = auto()  # one end's certificate has expired: nothing new on this one


Listener = Callable[[Identity, WorkloadCertificate | None], None]


class CertificateManager:
    """Keeps certificates fresh. `clock` gives Unix seconds; `random` spreads the renewals.

    `on_attempt` is called after each attempt at the CA, with None if it failed; must not raise.
    """

    def __init__(
        self,
        issuer: CertificateIssuer,
        *,
        clock: Callable[[], float],
        random: Random,
        on_attempt: Listener | None = None,
    ) -> None:
        self._issuer = issuer
        self._on_attempt = on_attempt
        self._clock = clock
        self._rotation = Rotation(random)
        self._waiting: dict[Identity, trio.Event] = {}
        self._work = trio.Event()
        self._has_stopped = False

    def cached(self, identity: Identity) -> WorkloadCertificate | None:
        """Give the certificate if it is here and valid; never waits."""
        return self._rotation.certificate(identity, self._clock())

    def standing(self, certificate: WorkloadCertificate, peer_not_after: float) -> Standing:
        """Judge a tunnel made with `certificate`, to a peer whose own runs out at a Unix time."""
        now = self._clock()
        if now >= peer_not_after or certificate.has_expired(now):
            return Standing.EXPIRED
        return Standing.CURRENT if self._rotation.is_newest(certificate) else Standing.ROTATED

    async def certificate_for(self, identity: Identity) -> WorkloadCertificate:
        """Give a valid certificate, fetching it if need be; many may wait for the same one.

        Raises:
            IdentityError: the CA refused, now or at the last attempt (a retry is under way in the
                background), or does not answer; or the identity was forgotten while we waited.
        """
        await trio.lowlevel.checkpoint()
        self._want(identity, Urgency.CONNECTION)
        with trio.move_on_after(WAIT_SECONDS):
            return await self._available(identity)
        raise IdentityError(
            f"{_about(identity)}: no certificate within {WAIT_SECONDS:g} s;"
            f" {self._issuer} has not answered yet"
        )

    async def _available(self, identity: Identity) -> WorkloadCertificate:
        while True:
            status = self._rotation.status(identity, self._clock())
            if status is None or self._has_stopped:
                raise IdentityError(f"{_about(identity)}: the identity is no longer needed")
            if status.certificate is not None:
                return status.certificate
            if status.error is not None:
                raise IdentityError(f"{_about(identity)}: {status.error}")
            await self._waiting.setdefault(identity, trio.Event()).wait()

    def prefetch(self, identity: Identity) -> None:
        """Fetch a certificate that will probably be needed soon."""
        self._want(identity, Urgency.PREFETCH)

    def renew(self, identity: Identity) -> None:
        """Replace a certificate that is of no use any more; it is handed out until then."""
        self._rotation.renew(identity, self._clock())
        self._work.set()

    def forget(self, identity: Identity) -> None:
        """Drop an identity that has no workload on this node any more."""
        self._rotation.forget(identity)
        self._wake_waiters(identity)

    def snapshot(self) -> list[CertificateStatus]:
        """List what is known, sorted by identity, for the configuration dump."""
        return self._rotation.snapshot(self._clock())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch and renew until cancelled."""
        try:
            async with trio.open_nursery() as fetches:
                task_status.started()
                while True:
                    self._work = trio.Event()
                    now = self._clock()
                    for identity in self._rotation.take_due(now):
                        fetches.start_soon(self._fetch, identity)
                    nap = min(NAP_SECONDS_MAX, max(0.0, self._rotation.next_due() - now))
                    with trio.move_on_after(nap):
                        await self._work.wait()
        finally:
            self._has_stopped = True
            for identity in list(self._waiting):
                self._wake_waiters(identity)

    async def _fetch(self, identity: Identity) -> None:
        """Make one attempt and note its outcome."""
        try:
            with trio.fail_after(ISSUE_SECONDS):
                certificate = await self._issuer.issue(identity)
            self._check(certificate, identity)
        except trio.TooSlowError:
            self._failed(identity, f"no answer from {self._issuer} within {ISSUE_SECONDS:g} s")
        except ZtunnelError as exc:
            self._failed(identity, str(exc))
        else:
            self._rotation.succeeded(certificate, identity, self._clock())
            self._tell(identity, certificate)
            log.debug(
                "certificate fetched", identity=str(identity), not_after=certificate.not_after
            )
        self._wake_waiters(identity)
        self._work.set()  # a place in flight is free

    def _check(self, certificate: WorkloadCertificate, identity: Identity) -> None:
        """Refuse a certificate of someone else, or of yesterday."""
        if certificate.identity != identity:
            raise IdentityError(f"did not find expected SAN: {identity} ({self._issuer})")
        if certificate.has_expired(self._clock()):
            raise IdentityError(f"{self._issuer} returned a certificate that has expired")

    def _failed(self, identity: Identity, error: str) -> None:
        now = self._clock()
        self._rotation.failed(error, identity, now)
        status = self._rotation.status(identity, now)
        self._tell(identity, None)
        if status is None:
            return
        if status.state is CertificateState.AVAILABLE:
            log.info("certificate not renewed", identity=str(identity), error=error)
        else:
            log.warning("certificate unavailable", identity=str(identity), error=error)

    def _tell(self, identity: Identity, certificate: WorkloadCertificate | None) -> None:
        if self._on_attempt is not None:
            self._on_attempt(identity, certificate)

    def _want(self, identity: Identity, urgency: Urgency) -> None:
        self._rotation.want(identity, urgency, self._clock())
        self._work.set()

    def _wake_waiters(self, identity: Identity) -> None:
        event = self._waiting.pop(identity, None)
        if event is not None:
            event.set()


def _about(identity: Identity) -> str:
    return f"identity error: {identity}"
