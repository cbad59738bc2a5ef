"""Revocation lists: which certificates an authority has taken back (RFC 5280 s5, dataplane.md 7.5).

How it works: `links` boils a verified chain down to what revocation needs, one `Link` for each
certificate below the anchor; a tunnel keeps that for as long as it lives. `revoked` asks the lists
now in force about links, at the handshake and again after each reload. A list counts for an issuer
only if it bears the issuer's name and its key made the signature, so that an old and a new root of
one name do not revoke each other's certificates. What no list knows is not revoked; an expired list
still counts; dates of certificates are not looked at, so expiry never cuts a tunnel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

# A ConfigMap holds 1 MiB, 20 000 revocations, which take 20 ms to read; more would stall the node.
FILE_BYTES_MAX = 4 * 1024 * 1024
ISSUERS_MAX = 256  # remembered, to share them between tunnels; a mesh has a handful
PEM_MARKER = b"-----BEGIN"
PEM_LIST = re.compile(rb"-----BEGIN X509 CRL-----(.*?)(-----END X509 CRL-----|\Z)", re.DOTALL)
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signed a certificate: name and public key, both DER."""

    name: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """One certificate of a verified chain, as revocation sees it."""

    issuer: Issuer
    serial: int
    is_leaf: bool


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RevocationList:
    """One list; `next_update` (Unix seconds) is only told, never judged."""

    issuer_name: bytes
    serials: frozenset[int]
    covers_leaves: bool
    covers_authorities: bool
    next_update: float | None
    _content: x509.CertificateRevocationList = field(repr=False)

    @classmethod
    def read(cls, content: x509.CertificateRevocationList) -> Self:
        """Take a parsed list.

        Raises:
            ValueError: it is of a kind that we would misread: a delta, an indirect list, or one
                with a critical extension we do not know.
        """
        leaves, authorities = _scope(content)
        update = content.next_update_utc
        return cls(
            issuer_name=content.issuer.public_bytes(),
            serials=frozenset(entry.serial_number for entry in content),
            covers_leaves=leaves,
            covers_authorities=authorities,
            next_update=None if update is None else update.timestamp(),
            _content=content,
        )

    def lists(self, link: Link) -> bool:
        """Say whether the certificate stands in this list; who signed the list is not asked."""
        covered = self.covers_leaves if link.is_leaf else self.covers_authorities
        return covered and link.serial in self.serials

    def der(self) -> bytes:
        """Give the list as `x509.load_der_x509_crl` reads it."""
        return self._content.public_bytes(Encoding.DER)

    def is_signed_by(self, issuer: Issuer) -> bool:
        """Say whether the key of `issuer` made the signature."""
        try:
            key = load_der_public_key(issuer.key)
            return self._content.is_signature_valid(key)  # type: ignore[arg-type]  # checked there
        except (*_UNREADABLE, TypeError):
            return False


def parse_lists(data: bytes) -> list[RevocationList]:
    """Read PEM with any number of lists (other blocks are skipped), or one list in DER.

    Nothing but white space, or PEM without a list, means no revocations.

    Raises:
        ValueError: the file is too long, or a list in it cannot be read.
    """
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    if not data.strip():
        return []
    try:
        if PEM_MARKER not in data:
            return [RevocationList.read(x509.load_der_x509_crl(data))]
        blocks = [match[0] for match in PEM_LIST.finditer(data)]
        return [RevocationList.read(x509.load_pem_x509_crl(block)) for block in blocks]
    except _UNREADABLE as exc:
        raise ValueError(f"not a certificate revocation list: {exc}") from exc


class Revocations:
    """The lists in force, and whoever wants to know when they change. Empty until `replace`."""

    def __init__(self) -> None:
        self.generation = 0  # how often the lists were replaced
        self._lists: dict[bytes, list[RevocationList]] = {}
        self._issuers: dict[bytes, Issuer] = {}
        self._signed: dict[tuple[RevocationList, Issuer], bool] = {}
        self._listeners: dict[int, Callable[[], None]] = {}
        self._subscriptions = 0

    def replace(self, lists: Collection[RevocationList]) -> None:
        """Put other lists in force as a whole and tell the listeners, who must not raise."""
        self.generation += 1
        self._signed.clear()
        self._lists = {}
        for one in lists:
            self._lists.setdefault(one.issuer_name, []).append(one)
        for listener in tuple(self._listeners.values()):
            listener()

    def in_force(self) -> tuple[bytes, ...]:
        """Give the lists in force, DER, so that another process can have them."""
        return tuple(one.der() for lists in self._lists.values() for one in lists)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each change; return how to stop that."""
        self._subscriptions += 1
        ticket = self._subscriptions
        self._listeners[ticket] = listener

        def unsubscribe() -> None:
            self._listeners.pop(ticket, None)

        return unsubscribe

    def links(self, chain: Sequence[bytes]) -> tuple[Link, ...]:
        """Boil down a verified chain, DER, leaf first, anchor last; the anchor is not judged.

        Raises:
            ValueError: a certificate cannot be read.
        """
        try:
            return tuple(
                Link(self._issuer(above), _serial(below), number == 0)
                for number, (below, above) in enumerate(pairwise(chain))
            )
        except _UNREADABLE as exc:
            raise ValueError(f"unreadable certificate: {exc}") from exc

    def revoked(self, links: Collection[Link]) -> Link | None:
        """Give the first certificate that an authority has taken back; None if there is none."""
        for link in links:
            for one in self._lists.get(link.issuer.name, ()):
                if one.lists(link) and self._is_signed(one, link.issuer):
                    return link
        return None

    def _is_signed(self, one: RevocationList, issuer: Issuer) -> bool:
        """Verify a signature once for each list and issuer."""
        known = self._signed.get((one, issuer))
        if known is None:
            if len(self._signed) >= ISSUERS_MAX:
                self._signed.clear()
            known = self._signed[one, issuer] = one.is_signed_by(issuer)
        return known

    def _issuer(self, der: bytes) -> Issuer:
        known = self._issuers.get(der)
        if known is None:
            if len(self._issuers) >= ISSUERS_MAX:
                self._issuers.clear()
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            known = self._issuers[der] = Issuer(
                certificate.subject.public_bytes(),
                key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            )
        return known


def _serial(der: bytes) -> int:
    return x509.load_der_x509_certificate(der).serial_number


def _scope(content: x509.CertificateRevocationList) -> tuple[bool, bool]:
    """Say whether a list speaks of leaves and of authorities (RFC 5280 s5.2.5).

    Raises:
        ValueError: as `RevocationList.read`.
    """
    leaves = authorities = True
    for extension in content.extensions:
        value = extension.value
        if isinstance(value, x509.IssuingDistributionPoint):
            if value.indirect_crl:
                raise ValueError("an indirect list")
            attributes_only = value.only_contains_attribute_certs
            leaves = not (value.only_contains_ca_certs or attributes_only)
            authorities = not (value.only_contains_user_certs or attributes_only)
        elif extension.critical:
            raise ValueError(f"a list with critical extension {extension.oid.dotted_string}")
    return leaves, authorities
