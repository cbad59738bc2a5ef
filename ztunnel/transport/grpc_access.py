"""Where the control plane is, whom to trust there and what to show it (state-and-xds.md 2).

Files are read again for every call: the trust root, so that a new one is used without a restart,
and the token, which the kubelet renews.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from cryptography import x509

from ztunnel.errors import CallError
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.tls.context import ALPN

if TYPE_CHECKING:
    from ztunnel.config import Config

# Where distributions keep the roots they trust, if OpenSSL was not built to know.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)

LOCAL = "LOCAL"  # the status of what failed before anybody was asked


class Trust(NamedTuple):
    """Roots, and the settings for TLS that were made of them, which takes a while."""

    roots_pem: bytes
    context: ssl.SSLContext


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcAccess:
    """Where a server is, whom to trust there and what to show it.

    `alternative_hostname` is accepted in the server's certificate besides its own name. The
    cluster's id goes along with a token only.
    """

    server: ServerUrl
    root: Source
    alternative_hostname: str | None = None
    token: Source | None = None
    cluster_id: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls12_enabled: bool = False

    @classmethod
    def for_xds(cls, config: Config) -> Self:
        """Make one for the control plane; there must be an address."""
        assert config.xds_address is not None
        return cls(
            server=config.xds_address,
            root=config.xds_root,
            alternative_hostname=config.alternative_xds_hostname,
            token=config.token,
            cluster_id=config.cluster_id,
            headers=config.xds_headers,
            tls12_enabled=config.tls12_enabled,
        )

    @classmethod
    def for_ca(cls, config: Config) -> Self:
        """Make one for the certificate authority; there must be an address."""
        assert config.ca_address is not None
        return cls(
            server=config.ca_address,
            root=config.ca_root,
            alternative_hostname=config.alternative_ca_hostname,
            token=config.token,
            cluster_id=config.cluster_id,
            headers=config.ca_headers,
            tls12_enabled=config.tls12_enabled,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of which the server's certificate must have one, in the order to try them."""
        alternative = self.alternative_hostname
        return (self.server.host, alternative) if alternative else (self.server.host,)

    def read_trust(self, known: Trust | None = None) -> Trust:
        """Return the settings for TLS with the roots of this moment, `known` if still so; blocks.

        Raises:
            CallError: they cannot be read, or are none. Never falls back to others.
        """
        what = f"trust root {self.root!r}"
        try:
            pem = _system_roots() if self.root.kind is SourceKind.SYSTEM else _read(self.root)
            if known is not None and pem == known.roots_pem:
                return known
            x509.load_pem_x509_certificates(pem)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and host name
            context.load_verify_locations(cadata=pem.decode("ascii", "ignore"))
        except (OSError, ValueError) as exc:
            raise CallError(f"{what}: {exc}", status=LOCAL) from exc
        # Every certificate of the bundle is an anchor, self-signed or not, as in the reference.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        has_tls12 = self.tls12_enabled
        context.minimum_version = ssl.TLSVersion.TLSv1_2 if has_tls12 else ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols([ALPN])
        return Trust(pem, context)

    def read_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries; blocks.

        Raises:
            CallError: there should be a token but it cannot be read, or is empty.
        """
        if self.token is None:
            return self.headers
        what = f"token {self.token!r}"
        try:
            token = _read(self.token).decode("ascii").strip()
        except (OSError, ValueError) as exc:
            raise CallError(f"{what}: {exc}", status=LOCAL) from exc
        if not token.isprintable() or not token:
            raise CallError(f"{what}: it is empty or has control characters", status=LOCAL)
        credentials = (("authorization", f"Bearer {token}"), ("clusterid", self.cluster_id))
        return credentials + self.headers


def _read(source: Source) -> bytes:
    if source.kind is SourceKind.FILE:
        return Path(source.value).read_bytes()
    return source.value.encode()


def _system_roots() -> bytes:
    """Read the bundle of this system."""
    for path in (ssl.get_default_verify_paths().cafile, *SYSTEM_BUNDLES):
        if path and Path(path).is_file():  # None if OpenSSL's own is not there
            return Path(path).read_bytes()
    raise FileNotFoundError("no trust store of the system was found")
