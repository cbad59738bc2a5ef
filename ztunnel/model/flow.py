"""The facts of one connection that policy may judge (dataplane.md 9.3)."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Who calls whom, after everything about the destination has been resolved.

    `source` is the TLS identity, None without mutual TLS. `source_endpoint` is the HBONE peer or
    the plaintext client. `destination` is the application's own address and final port.
    """

    source: Identity | None
    source_endpoint: Endpoint
    destination: Endpoint
