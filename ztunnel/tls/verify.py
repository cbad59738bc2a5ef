"""Is this peer who we expect? Runs right after the handshake, before any byte above TLS.

The chain was verified by OpenSSL; here only names count (dataplane.md 3.2, 7.3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

from cryptography import x509

from ztunnel.errors import PeerIdentityError, RevokedError, TlsError
from ztunnel.model.identity import Identity, TrustDomain
from ztunnel.tls.alerts import Alert
from ztunnel.tls.certificate import istio_identities, uri_names
from ztunnel.tls.crl import Link, Revocations

LEAVES_MAX = 1024  # two kibibytes each
SHOWN_MAX = 8  # names in an error text; a peer may bring thousands
SHOWN_CHARACTERS_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCertificate:
    """What a peer showed; `identities` are the URI names that parse as Istio's, in order.

    `links` are what revocation needs to know of the verified chain; empty if that is not checked.
    """

    uri_sans: tuple[str, ...]
    identities: tuple[Identity, ...]
    not_after: float  # Unix seconds
    serial: int
    links: tuple[Link, ...] = ()

    @classmethod
    @lru_cache(maxsize=LEAVES_MAX)
    def parse(cls, leaf_der: bytes) -> Self:
        """Read a leaf that OpenSSL accepted; remembered, as a peer comes again with the same.

        Raises:
            TlsError: it cannot be read; better no connection than one with a guessed name.
        """
        try:
            leaf = x509.load_der_x509_certificate(leaf_der)
            uris = uri_names(leaf)
            not_after = leaf.not_valid_after_utc.timestamp()
            serial = leaf.serial_number
        except (ValueError, x509.InvalidVersion, x509.UnsupportedGeneralNameType) as exc:
            raise TlsError(
                f"unreadable peer certificate: {exc}", code=Alert.BAD_CERTIFICATE
            ) from exc
        return cls(
            uri_sans=uris,
            identities=istio_identities(uris),
            not_after=not_after,
            serial=serial,
        )

    def checked(self, chain: Sequence[bytes], revocations: Revocations) -> Self:
        """Give the same with the links of its verified chain (DER, leaf first).

        Raises:
            RevokedError: a certificate of the chain has been taken back.
            TlsError: the chain cannot be read.
        """
        try:
            links = revocations.links(chain)
        except ValueError as exc:
            raise TlsError(f"peer's chain: {exc}", code=Alert.BAD_CERTIFICATE) from exc
        revoked = revocations.revoked(links)
        if revoked is not None:
            raise RevokedError(
                f"peer certificate revoked by CRL (serial {revoked.serial:x})",
                code=Alert.CERTIFICATE_REVOKED,
            )
        return replace(self, links=links)


def verify_server(peer: PeerCertificate, expected: Collection[Identity]) -> Identity:
    """Give the identity under which we accept a server: the first of its names we expect.

    Raises:
        PeerIdentityError: it has none of them; also if nothing is expected.
    """
    for identity in peer.identities:
        if identity in expected:
            return identity
    raise PeerIdentityError(
        "identity verification error: peer did not present the expected SAN"
        f" ({_listed(expected)}), got {_listed(peer.identities)}",
        code=Alert.BAD_CERTIFICATE,
    )


def verify_client(peer: PeerCertificate, trust_domains: Collection[TrustDomain]) -> Identity | None:
    """Give the identity of a client: the first of its names in one of `trust_domains`.

    With no trust domain given, that is, when our own leaf has no Istio name, there is no check and
    the client's first name counts; None if it has none. The reference always takes the first name,
    even one of a foreign trust domain that it did not check; ours is the one that was.

    Raises:
        PeerIdentityError: the client has no name in `trust_domains`.
    """
    if not trust_domains:
        return peer.identities[0] if peer.identities else None
    for identity in peer.identities:
        if identity.trust_domain in trust_domains:
            return identity
    raise PeerIdentityError(
        "identity verification error: peer did not present the expected trustdomain"
        f" ({_listed(trust_domains)}), got {_listed(peer.identities)}",
        code=Alert.BAD_CERTIFICATE,
    )


def _listed(names: Iterable[object]) -> str:
    """Join names as the reference prints them, but never without end."""
    texts = [str(name)[:SHOWN_CHARACTERS_MAX] for name in names]
    if len(texts) > SHOWN_MAX:
        texts[SHOWN_MAX:] = [f"and {len(texts) - SHOWN_MAX} more"]
    return ",".join(texts)
