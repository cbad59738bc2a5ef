"""A certificate authority for development, demonstrations and tests.

It issues what Istio's CA issues: leaves with an empty subject and one critical SPIFFE name
(X509-SVID s4, dataplane.md 8.2). Its keys lie in memory; whoever holds them is trusted by all.
`subordinate` makes an authority below this one; `revoke` prints what it takes back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Flag, auto
from ipaddress import ip_address
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
    return time.time()  # noqa: TID251 - this is the clock that others are given


@dataclass(frozen=True, slots=True, eq=False)
class DevelopmentCa:
    """A root of its own, or an authority below one; `clock` gives Unix seconds.

    `key` belongs to the first of `intermediates` if there are any, which lead up to the root.
    `other_roots` stand beside the root in the bundle, while roots are being exchanged.
    """

    root: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    clock: Callable[[], float] = wall_clock
    intermediates: tuple[x509.Certificate, ...] = ()
    other_roots: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(
        cls, trust_domain: str = "cluster.local", *, clock: Callable[[], float] = wall_clock
    ) -> Self:
        """Make a new root."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _dated(x509.CertificateBuilder(), clock() - BACKDATED_SECONDS, ROOT_SECONDS)
        builder = _as_authority(builder, f"development root of {trust_domain}", key.public_key())
        names = _names([SCHEME + trust_domain])
        return cls(builder.add_extension(names, critical=False).sign(key, SHA256()), key, clock)

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
        return _pem(self.root, *self.other_roots)

    @property
    def signer(self) -> x509.Certificate:
        """The certificate that leaves are issued under."""
        return self.intermediates[0] if self.intermediates else self.root

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
            chain_pem=_pem(leaf, *self.intermediates),
            key_pem=private_pem(key),
            roots_pem=self.roots_pem,
        )

    def subordinate(self, name: str = "development intermediate") -> Self:
        """Make an authority with a key of its own, whose certificate this one signs."""
        key = ec.generate_private_key(ec.SECP256R1())
        above = self.signer
        start = above.not_valid_before_utc.timestamp()
        builder = _dated(x509.CertificateBuilder(), start, ROOT_SECONDS)
        builder = _as_authority(builder, name, key.public_key(), issuer=above.subject)
        builder = builder.add_extension(self._key_identifier(), critical=False)
        signed = builder.sign(self.key, SHA256())
        return replace(self, key=key, intermediates=(signed, *self.intermediates))

    def revoke(self, *serials: int, lifetime_seconds: float = DAY_SECONDS) -> bytes:
        """Print the list, PEM, of the serials that this authority takes back.

        A negative `lifetime_seconds` makes a list that has expired.
        """
        now = self.clock()
        start = min(now, now + lifetime_seconds) - BACKDATED_SECONDS
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.signer.subject)
            .last_update(datetime.fromtimestamp(int(start), UTC))
            .next_update(datetime.fromtimestamp(int(now + lifetime_seconds), UTC))
            .add_extension(self._key_identifier(), critical=False)
        )
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            date = datetime.fromtimestamp(int(start), UTC)
            builder = builder.add_revoked_certificate(entry.revocation_date(date).build())
        return builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM)

    def sign(self, csr_pem: bytes, *, ttl_seconds: float = DAY_SECONDS) -> list[bytes]:
        """Answer a signing request as Istio's CA does: leaf, intermediates, root bundle, as PEM.

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
        return [*map(_pem, (leaf, *self.intermediates)), self.roots_pem]

    def certify(
        self,
        public_key: ec.EllipticCurvePublicKey,
        uris: Sequence[str],
        *,
        ttl_seconds: float = DAY_SECONDS,
        usage: Usage | None = Usage.BOTH,
        hosts: Sequence[str] = (),
    ) -> x509.Certificate:
        """Sign a leaf with these names and usages; None leaves the usage extension out.

        `hosts` are DNS names and addresses, for servers of the control plane. A negative
        `ttl_seconds` makes a certificate that has expired.

        Raises:
            ValueError: a name cannot stand in a certificate.
        """
        now = self.clock()
        start = min(now, now + ttl_seconds) - BACKDATED_SECONDS
        builder = _dated(x509.CertificateBuilder(), start, now + ttl_seconds - start)
        builder = (
            builder.subject_name(x509.Name([]))
            .issuer_name(self.signer.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(for_ca=False), critical=True)
            .add_extension(self._key_identifier(), critical=False)
        )
        if uris or hosts:
            builder = builder.add_extension(_names(uris, hosts), critical=True)
        if usage is not None:
            builder = builder.add_extension(_extended_usage(usage), critical=False)
        return builder.sign(self.key, SHA256())

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


@dataclass(frozen=True, slots=True)
class DevelopmentIssuer:
    """Issues certificates in this process, in place of a CA client."""

    authority: DevelopmentCa
    ttl_seconds: float = DAY_SECONDS

    def __str__(self) -> str:
        return "the development CA of this process"

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


def _as_authority(
    builder: x509.CertificateBuilder,
    name: str,
    key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Name | None = None,
) -> x509.CertificateBuilder:
    """Say that `key` may sign certificates and lists; without an issuer it is a root."""
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
    return (
        builder.subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(for_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _names(uris: Sequence[str], hosts: Sequence[str] = ()) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


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
