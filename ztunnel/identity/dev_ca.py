"""A certificate authority for development, demonstrations and tests.

It issues what Istio's CA issues: leaves with an empty subject and one critical SPIFFE name
(X509-SVID s4, dataplane.md 8.2). Its root key lies in memory; whoever holds it is trusted by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Flag, auto
from typing import Self

import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztunnel.errors import IdentityError
from ztunnel.model.identity import SCHEME, Identity, TrustDomain
from ztunnel.tls.certificate import WorkloadCertificate, istio_identities, uri_names
from ztunnel.tls.csr import private_pem

DAY_SECONDS = 86400.0
ROOT_SECONDS = 3650 * DAY_SECONDS
BACKDATED_SECONDS = 120.0  # clocks of nodes differ; istiod does the same


class Usage(Flag):
    """What a leaf may be used for."""

    SERVER = auto()
    CLIENT = auto()
    BOTH = SERVER | CLIENT


def wall_clock() -> float:
    """Give the time in Unix seconds."""
    return datetime.now(UTC).timestamp()


@dataclass(frozen=True, slots=True, eq=False)
class DevelopmentCa:
    """A root of its own; `clock` gives Unix seconds."""

    root: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    clock: Callable[[], float] = wall_clock

    @classmethod
    def create(
        cls, trust_domain: str = "cluster.local", *, clock: Callable[[], float] = wall_clock
    ) -> Self:
        """Make a new root."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"development root of {trust_domain}")]
        )
        builder = _dated(x509.CertificateBuilder(), clock() - BACKDATED_SECONDS, ROOT_SECONDS)
        root = (
            builder.subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(for_ca=True), critical=True)
            .add_extension(_names([SCHEME + trust_domain]), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, SHA256())
        )
        return cls(root, key, clock)

    @classmethod
    def from_pem(cls, pem: bytes, *, clock: Callable[[], float] = wall_clock) -> Self:
        """Read what `to_pem` printed: a root certificate and its P-256 key, in any order.

        Raises:
            ValueError: one is missing or they do not belong together.
        """
        root = x509.load_pem_x509_certificate(pem)
        marker = pem.find(b"-----BEGIN PRIVATE KEY-----")
        if marker < 0:
            raise ValueError("no PKCS#8 private key")
        key = load_pem_private_key(pem[marker:], password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the private key is not an elliptic curve key")  # noqa: TRY004  # bad input, not a bad call
        if key.public_key() != root.public_key():
            raise ValueError("the private key is not the root's")
        return cls(root, key, clock)

    def to_pem(self) -> bytes:
        """Print root and key, to be handed to a process we trust; never to a log or disk."""
        return self.roots_pem + private_pem(self.key)

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle."""
        return self.root.public_bytes(Encoding.PEM)

    @property
    def trust_domain(self) -> TrustDomain | None:
        """The trust domain this root was made for; None if the root does not say."""
        for uri in uri_names(self.root):
            if uri.startswith(SCHEME):
                return TrustDomain(uri[len(SCHEME) :])
        return None

    def issue(
        self, identity: Identity, *, ttl_seconds: float = DAY_SECONDS, usage: Usage = Usage.BOTH
    ) -> WorkloadCertificate:
        """Make a key and a certificate for `identity`, valid for `ttl_seconds` from now.

        Raises:
            IdentityError: the identity cannot stand in a certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            leaf = self.certify(
                key.public_key(), [str(identity)], ttl_seconds=ttl_seconds, usage=usage
            )
        except ValueError as exc:
            raise IdentityError(f"invalid spiffe identity: {identity}: {exc}") from exc
        return WorkloadCertificate.load(
            chain_pem=leaf.public_bytes(Encoding.PEM),
            key_pem=private_pem(key),
            roots_pem=self.roots_pem,
        )

    def sign(self, csr_pem: bytes, *, ttl_seconds: float = DAY_SECONDS) -> list[bytes]:
        """Answer a signing request as Istio's CA does: leaf, then root bundle, each as PEM.

        Raises:
            IdentityError: the request is malformed, not signed by its key, or asks for anything
                but exactly one Istio identity.
        """
        try:
            request = x509.load_pem_x509_csr(csr_pem)
            names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = tuple(names.get_values_for_type(x509.UniformResourceIdentifier))
            key = request.public_key()
            signed = request.is_signature_valid
        except (ValueError, x509.ExtensionNotFound, InvalidSignature) as exc:
            raise IdentityError(f"malformed signing request: {exc}") from exc
        if not signed or not isinstance(key, ec.EllipticCurvePublicKey):
            raise IdentityError("signing request without a valid elliptic curve signature")
        if len(list(names)) != 1 or len(istio_identities(uris)) != 1:
            raise IdentityError("signing request without exactly one Istio identity")
        leaf = self.certify(key, uris, ttl_seconds=ttl_seconds)
        return [leaf.public_bytes(Encoding.PEM), self.roots_pem]

    def certify(
        self,
        public_key: ec.EllipticCurvePublicKey,
        uris: Sequence[str],
        *,
        ttl_seconds: float = DAY_SECONDS,
        usage: Usage | None = Usage.BOTH,
    ) -> x509.Certificate:
        """Sign a leaf with these names and usages; None leaves the usage extension out.

        A negative `ttl_seconds` makes a certificate that has expired.

        Raises:
            ValueError: a name cannot stand in a certificate.
        """
        now = self.clock()
        start = min(now, now + ttl_seconds) - BACKDATED_SECONDS
        builder = _dated(x509.CertificateBuilder(), start, now + ttl_seconds - start)
        builder = (
            builder.subject_name(x509.Name([]))
            .issuer_name(self.root.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(for_ca=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        if uris:
            builder = builder.add_extension(_names(uris), critical=True)
        if usage is not None:
            builder = builder.add_extension(_extended_usage(usage), critical=False)
        return builder.sign(self.key, SHA256())


@dataclass(frozen=True, slots=True)
class DevelopmentIssuer:
    """Issues certificates in this process, in place of a CA client."""

    authority: DevelopmentCa
    ttl_seconds: float = DAY_SECONDS

    async def issue(self, identity: Identity) -> WorkloadCertificate:
        """Make a certificate; a quarter of a millisecond of work, so no thread is worth it.

        Raises:
            IdentityError: the identity cannot stand in a certificate.
        """
        await trio.lowlevel.checkpoint()
        return self.authority.issue(identity, ttl_seconds=self.ttl_seconds)


def _dated(
    builder: x509.CertificateBuilder, start: float, lifetime: float
) -> x509.CertificateBuilder:
    """Set the validity; certificates know whole seconds, and an end is rounded up."""
    end = math.ceil(start + lifetime)
    return builder.not_valid_before(datetime.fromtimestamp(int(start), UTC)).not_valid_after(
        datetime.fromtimestamp(end, UTC)
    )


def _names(uris: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])


def _extended_usage(usage: Usage) -> x509.ExtendedKeyUsage:
    purposes = [
        (Usage.SERVER, ExtendedKeyUsageOID.SERVER_AUTH),
        (Usage.CLIENT, ExtendedKeyUsageOID.CLIENT_AUTH),
    ]
    return x509.ExtendedKeyUsage([oid for flag, oid in purposes if flag in usage])


def _key_usage(*, for_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not for_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=for_ca,
        crl_sign=for_ca,
        encipher_only=False,
        decipher_only=False,
    )
