"""The PROXY protocol header, version 2 (HAProxy's specification s2.2), as waypoints read it.

Only what an application tunnel needs: TCP, and two fields of Istio's (dataplane.md 3.6).
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
VERSION_AND_COMMAND: Final = 0x21  # version 2, PROXY
UNSPECIFIED_STREAM: Final = 0x01  # no addresses, as the two ends are of different families
IPV4_STREAM: Final = 0x11
IPV6_STREAM: Final = 0x21
TLV_PEER_IDENTITY: Final = 0xD0  # the caller's SPIFFE id
TLV_TARGET_HOST: Final = 0xD1  # the host name it meant; the reference reserves it and sends none
HEADER: Final = struct.Struct(">12sBBH")
TLV: Final = struct.Struct(">BH")


def proxy_header(
    source: Endpoint, destination: Endpoint, *, identity: Identity | None, host: str | None
) -> bytes:
    """Announce a connection from `source` to `destination`."""
    family, addresses = _addresses(source, destination)
    fields = b""
    if identity is not None:
        fields += _field(TLV_PEER_IDENTITY, str(identity).encode())
    if host:
        fields += _field(TLV_TARGET_HOST, host.encode())
    size = len(addresses) + len(fields)
    return HEADER.pack(SIGNATURE, VERSION_AND_COMMAND, family, size) + addresses + fields


def _addresses(source: Endpoint, destination: Endpoint) -> tuple[int, bytes]:
    if source.ip.version != destination.ip.version:
        return UNSPECIFIED_STREAM, b""
    ports = struct.pack(">HH", source.port, destination.port)
    family = IPV4_STREAM if isinstance(source.ip, IPv4Address) else IPV6_STREAM
    return family, source.ip.packed + destination.ip.packed + ports


def _field(kind: int, value: bytes) -> bytes:
    return TLV.pack(kind, len(value)) + value
