"""TLS settings for servers and clients (dataplane.md 7.1), one context per certificate and role.

The settings hold on all sides: TLS 1.3 (1.2 only if configured), AES-GCM, ALPN `h2`, both ends
certified, names judged by us (`verify.py`), no session tickets unless resumption is wanted.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.errors import TlsError
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import (
    PEM_CERTIFICATE,
    WorkloadCertificate,
    has_signed,
    parse_bundle,
)
from ztunnel.tls.crl import Revocations
from ztunnel.tls.groups import POST_QUANTUM, prefer_usual_groups, restrict_groups
from ztunnel.tls.keylog import KeyLog
from ztunnel.tls.resumption import Sessions
from ztunnel.tls.sealer import SealBuffer

if TYPE_CHECKING:
    from ztunnel.config import Config

ALPN = "h2"
# Forward secrecy and AES-GCM; the only names that `set_ciphers` has a say in are those of TLS 1.2.
TLS12_CIPHERS = "ECDHE+AESGCM"
CONTEXTS_MAX = 1024  # per role; far more identities than a node has pods


@dataclass(frozen=True, slots=True, eq=False)
class TlsContext:
    """One certificate in one role, ready for handshakes; `revocations` None = not checked."""

    certificate: WorkloadCertificate
    server_side: bool
    ssl_context: ssl.SSLContext
    key_log: KeyLog
    seal_buffer: SealBuffer
    own_records: bool
    revocations: Revocations | None
    sessions: Sessions | None  # of a client; None = it does not resume


class TlsContexts:
    """Makes contexts and remembers them as long as a certificate is the newest of its identity.

    All of them share one key log and one sealing buffer, as they run on one thread.
    """

    def __init__(
        self,
        *,
        tls12_enabled: bool = False,
        own_records: bool = True,
        revocations: Revocations | None = None,
        resumption: bool = False,
    ) -> None:
        """Settle what holds for all; resumption needs our records, and no revocation lists."""
        self.revocations = revocations
        self._resumption = resumption and own_records and revocations is None
        self._tls12_enabled = tls12_enabled
        self._own_records = own_records
        self._key_log = KeyLog()
        self._seal_buffer = SealBuffer()
        self._servers: dict[Identity | None, TlsContext] = {}
        self._clients: dict[Identity | None, TlsContext] = {}

    @classmethod
    def of(cls, config: Config, revocations: Revocations | None) -> Self:
        """Make them as the operator chose.

        Raises:
            ConfigError: post-quantum key exchange is demanded, and this OpenSSL has none.
        """
        if config.post_quantum_only:
            restrict_groups(POST_QUANTUM, why="COMPLIANCE_POLICY=pqc")
        else:
            prefer_usual_groups()
        return cls(
            tls12_enabled=config.tls12_enabled,
            own_records=config.own_records,
            revocations=revocations,
            resumption=config.tls_resumption,
        )

    @property
    def seal_buffer(self) -> SealBuffer:
        """The buffer to give to record layers that come from a predecessor."""
        return self._seal_buffer

    def server(self, certificate: WorkloadCertificate) -> TlsContext:
        """Give the context that serves with `certificate`.

        Raises:
            TlsError: the certificate cannot be used: no roots, or key and chain do not fit.
        """
        return self._remembered(self._servers, certificate, server_side=True)

    def client(self, certificate: WorkloadCertificate) -> TlsContext:
        """Give the context that connects with `certificate`.

        Raises:
            TlsError: as `server`.
        """
        return self._remembered(self._clients, certificate, server_side=False)

    def forget(self, identity: Identity) -> None:
        """Drop the contexts of an identity that left the node."""
        self._servers.pop(identity, None)
        self._clients.pop(identity, None)

    def _remembered(
        self,
        contexts: dict[Identity | None, TlsContext],
        certificate: WorkloadCertificate,
        *,
        server_side: bool,
    ) -> TlsContext:
        known = contexts.get(certificate.identity)
        if known is not None and known.certificate is certificate:
            return known
        made = TlsContext(
            certificate=certificate,
            server_side=server_side,
            ssl_context=self._settings(certificate, server_side=server_side),
            key_log=self._key_log,
            seal_buffer=self._seal_buffer,
            own_records=self._own_records,
            revocations=self.revocations,
            sessions=Sessions() if self._resumption and not server_side else None,
        )
        contexts.pop(certificate.identity, None)
        while len(contexts) >= CONTEXTS_MAX:
            del contexts[next(iter(contexts))]
        contexts[certificate.identity] = made
        return made

    def _settings(self, certificate: WorkloadCertificate, *, server_side: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        )
        context.check_hostname = False  # peers have SPIFFE names, not host names
        context.verify_mode = ssl.CERT_REQUIRED
        # Every certificate of the bundle is an anchor, self-signed or not, as in the reference.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self._tls12_enabled:
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(TLS12_CIPHERS)
            context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols([ALPN])
        if server_side:
            # Usually nobody resumes (the reference's clients do not, and its contexts forget), and
            # each ticket would be one more record under our first keys.
            context.num_tickets = 1 if self._resumption else 0
        _load(context, certificate)
        if self._own_records:
            self._key_log.attach(context)
        return context


def _load(context: ssl.SSLContext, certificate: WorkloadCertificate) -> None:
    """Give chain, key and roots to OpenSSL, which reads keys only from files: from a memfd."""
    roots, _ = parse_bundle(certificate.roots_pem)
    if not roots:
        raise TlsError("tls error: the trust bundle holds no readable certificate")
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(certificate.key_pem + b"\n" + certificate.chain_pem)
            file.write(issuer_of_a_lone_leaf(certificate.chain_pem, roots))
        context.load_cert_chain(f"/proc/self/fd/{fd}")
        context.load_verify_locations(cadata=b"".join(roots))
    except (ssl.SSLError, OSError, ValueError) as exc:
        raise TlsError(f"tls error: certificate and key cannot be used: {exc}") from exc
    finally:
        os.close(fd)


def issuer_of_a_lone_leaf(chain_pem: bytes, roots: Sequence[bytes]) -> bytes:
    """Give the root (PEM) that has signed a leaf without intermediates; empty if there are some.

    OpenSSL would find and send it, too, but look for it anew in each handshake of ours, and verify
    our own leaf to do so: 75 of 610 us.
    """
    if len(PEM_CERTIFICATE.findall(chain_pem)) != 1:
        return b""
    leaf = x509.load_pem_x509_certificate(chain_pem)
    found = [x509.load_der_x509_certificate(root) for root in roots]
    named = [root for root in found if root.subject == leaf.issuer]
    if len(named) > 1:  # an authority that changes its key keeps its name
        named = [root for root in named if has_signed(root, leaf)]
    return b"\n" + named[0].public_bytes(Encoding.PEM) if named else b""
