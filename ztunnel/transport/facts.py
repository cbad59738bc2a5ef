"""What the handshake of a tunnel settled, for whoever asks later: policy, logs, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint
    from ztunnel.tls.certificate import WorkloadCertificate
    from ztunnel.tls.crl import Link


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelFacts:
    """What the handshake settled."""

    local: Endpoint
    remote: Endpoint
    peer: Identity | None
    peer_not_after: float  # Unix seconds
    certificate: WorkloadCertificate  # ours
    cipher: str
    version: str
    peer_links: tuple[Link, ...] = ()  # the peer's chain, for revocation; empty = cannot be judged
