"""Everything about certificates on one node, put together for `app` to make and run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio
from cryptography import x509

from ztunnel.identity.ca import CaClient
from ztunnel.identity.crl_watch import SETTLE_SECONDS, CrlWatch
from ztunnel.identity.dev_ca import wall_clock
from ztunnel.identity.manager import CertificateIssuer, CertificateManager
from ztunnel.identity.prefetch import LocalIdentities, Prefetcher
from ztunnel.linux.file_watch import FileWatch
from ztunnel.model.identity import Identity
from ztunnel.model.settings import ProxyMode
from ztunnel.telemetry.exposition import Family, Kind
from ztunnel.telemetry.metrics import outcome_of
from ztunnel.tls.certificate import WorkloadCertificate, has_signed, parse_bundle
from ztunnel.tls.context import TlsContexts
from ztunnel.tls.crl import Revocations

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.state.store import Store
    from ztunnel.telemetry.metrics import Metrics

log = structlog.get_logger()

Follower = Callable[[Identity, WorkloadCertificate | None], None]


class NodeCredentials:
    """Certificates, TLS contexts and revocation lists of one node. Make it, `run` it."""

    def __init__(
        self, config: Config, store: Store, metrics: Metrics, issuer: CertificateIssuer
    ) -> None:
        """Put it together and read the revocation lists for the first time.

        Raises:
            ConfigError: post-quantum key exchange is demanded, and this OpenSSL has none.
        """
        self._metrics = metrics
        self._issuer = issuer
        self.revocations = None if config.crl_path is None else Revocations()
        self.contexts = TlsContexts.of(config, self.revocations)
        self.on_certificate: Follower = lambda *_: None  # hears what came, and who was forgotten
        self.certificates = CertificateManager(
            issuer,
            clock=wall_clock,
            random=random.Random(),  # noqa: S311 - spreads renewals, keeps no secret
            on_attempt=self._on_attempt,
        )
        metrics.register([SecondsLeft(self.certificates)])
        self._prefetcher: Prefetcher | None = None
        if config.mode is ProxyMode.SHARED:
            local = LocalIdentities(config.node_name or "")
            self._prefetcher = Prefetcher(store, self.certificates, local, forget=self._forget)
        self._watch: CrlWatch | None = None
        if config.crl_path is not None and self.revocations is not None:
            self._watch = CrlWatch(
                FileWatch(config.crl_path, settle_seconds=SETTLE_SECONDS),
                self.revocations,
                on_load=outcome_of(metrics.crl_loads),
            )
            self._watch.load()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch, renew, forget and follow the lists until cancelled."""
        async with trio.open_nursery() as nursery:
            if isinstance(self._issuer, CaClient):
                nursery.start_soon(self._issuer.run)
            await nursery.start(self.certificates.run)
            if self._prefetcher is not None:
                await nursery.start(self._prefetcher.run)
            if self._watch is not None and self.revocations is not None:
                self.revocations.subscribe(partial(self._judge_own, self.revocations))
                nursery.start_soon(self._watch.run)
            task_status.started()

    def _on_attempt(self, identity: Identity, certificate: WorkloadCertificate | None) -> None:
        result = "failure" if certificate is None else "success"
        self._metrics.certificates.count(result).add()
        if certificate is not None:
            self.on_certificate(identity, certificate)
        if (
            certificate is not None
            and self.revocations is not None
            and is_revoked(certificate, self.revocations)
        ):
            log.error("the CA issues certificates that are revoked", identity=str(identity))

    def _forget(self, identity: Identity) -> None:
        self.contexts.forget(identity)
        self.on_certificate(identity, None)

    def _judge_own(self, revocations: Revocations) -> None:
        """Replace what was taken back; peers refuse it already, so it stays in use until then."""
        for status in self.certificates.snapshot():
            certificate = status.certificate
            if certificate is not None and is_revoked(certificate, revocations):
                log.warning(
                    "own certificate revoked by CRL, fetching another",
                    identity=str(status.identity),
                    serial=f"{certificate.serial:x}",
                )
                self.certificates.renew(status.identity)


def is_revoked(certificate: WorkloadCertificate, revocations: Revocations) -> bool:
    """Say whether a certificate of our own, or an authority above it, has been taken back."""
    chain, _ = parse_bundle(certificate.chain_pem)
    last = x509.load_der_x509_certificate(chain[-1])
    for root in parse_bundle(certificate.roots_pem)[0]:
        if has_signed(x509.load_der_x509_certificate(root), last):
            return revocations.revoked(revocations.links([*chain, root])) is not None
    return False


class SecondsLeft(Family):
    """How long each certificate is still valid, worked out at each scrape; below 0 = expired."""

    def __init__(self, certificates: CertificateManager) -> None:
        super().__init__(
            "ztunnel_certificate_seconds_left",
            "Validity left of the workloads' certificates (unstable)",
            kind=Kind.GAUGE,
            labels=("identity",),
        )
        self._certificates = certificates

    def text(self) -> Iterator[str]:
        """Print one series per identity that has a certificate; none for one that was forgotten."""
        self._counts.clear()
        now = wall_clock()
        for status in self._certificates.snapshot():
            if status.certificate is not None:
                self.count(str(status.identity)).set(status.certificate.expires(now))
        yield from super().text()
