"""One workload's certificate: its chain, its key and whom it trusts (dataplane.md 7.2, 7.4)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.model.identity import Identity, TrustDomain

PEM_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\s*", re.DOTALL
)


def uri_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """List the URI names of a certificate's subjectAltName; empty if it has none.

    Raises:
        ValueError: the extensions cannot be read.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    except x509.DuplicateExtension as exc:
        raise ValueError(f"extension {exc.oid.dotted_string} twice") from exc
    return tuple(names.value.get_values_for_type(x509.UniformResourceIdentifier))


def istio_identities(uris: tuple[str, ...]) -> tuple[Identity, ...]:
    """Parse the names that are Istio identities and skip the others (7.3)."""
    found = []
    for uri in uris:
        try:
            found.append(Identity.parse(uri))
        except ValueError:
            continue
    return tuple(found)


def parse_bundle(bundle_pem: bytes) -> tuple[list[bytes], int]:
    """Split a trust bundle into DER certificates; also count those that did not parse (7.4)."""
    roots: list[bytes] = []
    skipped = 0
    for block in PEM_CERTIFICATE.findall(bundle_pem):
        try:
            roots.append(x509.load_pem_x509_certificate(block).public_bytes(Encoding.DER))
        except ValueError:
            skipped += 1
    return roots, skipped


def has_signed(above: x509.Certificate, below: x509.Certificate) -> bool:
    """Say whether one certificate was issued by another: name and signature, no dates."""
    try:
        below.verify_directly_issued_by(above)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, InvalidSignature):
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WorkloadCertificate:
    """What a workload shows to its peers and whom it believes.

    Two of them are equal only if they are the same object: a renewed certificate is another one,
    and contexts are cached by that. Times are Unix seconds of the leaf.
    """

    identity: Identity | None  # the leaf's first Istio URI name
    chain_pem: bytes  # leaf first, then intermediates, no root
    key_pem: bytes = field(repr=False)  # PKCS#8
    roots_pem: bytes
    not_before: float
    not_after: float
    serial: int

    @classmethod
    def load(cls, *, chain_pem: bytes, key_pem: bytes, roots_pem: bytes) -> Self:
        """Make one from PEM; dates, serial and identity are read from the leaf.

        Raises:
            ValueError: the chain holds no readable leaf.
        """
        leaf = x509.load_pem_x509_certificate(chain_pem)
        identities = istio_identities(uri_names(leaf))
        return cls(
            identity=identities[0] if identities else None,
            chain_pem=chain_pem,
            key_pem=key_pem,
            roots_pem=roots_pem,
            not_before=leaf.not_valid_before_utc.timestamp(),
            not_after=leaf.not_valid_after_utc.timestamp(),
            serial=leaf.serial_number,
        )

    @property
    def trust_domains(self) -> tuple[TrustDomain, ...]:
        """Whose clients we accept (3.2): our own trust domain; empty = do not check."""
        return () if self.identity is None else (self.identity.trust_domain,)

    def expires(self, now: float) -> float:
        """Give the seconds of validity left; zero or less means expired."""
        return self.not_after - now

    def has_expired(self, now: float) -> bool:
        """Say whether the certificate can no longer be used."""
        return now >= self.not_after
