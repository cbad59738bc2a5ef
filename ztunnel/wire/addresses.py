"""Addresses inside protobuf messages: packed bytes and prefix lengths to nouns and back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ztunnel.errors import ResourceError
from ztunnel.model.network import PORT_MAX, IpAddress, IpNetwork, Port, canonical

V4_BYTES = 4
V6_BYTES = 16
MAPPED_BITS = 96  # RFC 4291 s2.5.5.2: what precedes the IPv4 address in a mapped IPv6 one


def read_ip(packed: bytes, field: str) -> IpAddress:
    """Return the canonical address.

    Raises:
        ResourceError: it has neither 4 nor 16 bytes.
    """
    if len(packed) == V4_BYTES:
        return IPv4Address(packed)
    if len(packed) == V6_BYTES:
        return canonical(IPv6Address(packed))
    raise ResourceError(f"{field}: {len(packed)} bytes are not an IP address")


def read_network(packed: bytes, length: int, field: str) -> IpNetwork:
    """Return a prefix; bits behind it need not be zero on the wire.

    Raises:
        ResourceError: the address is malformed, or shorter than its prefix.
    """
    ip = read_ip(packed, field)
    if length > 8 * len(packed):
        raise ResourceError(f"{field}: prefix length {length} is longer than the address")
    if isinstance(ip, IPv6Address):
        return IPv6Network((ip, length), strict=False)
    if len(packed) == V4_BYTES:
        return IPv4Network((ip, length), strict=False)
    if length < MAPPED_BITS:  # a range that holds more than mapped addresses stays as it is
        return IPv6Network((packed, length), strict=False)
    return IPv4Network((ip, length - MAPPED_BITS), strict=False)


def read_port(number: int, field: str) -> Port:
    """Return a port; the reference silently cuts a larger number to 16 bits.

    Raises:
        ResourceError: it is above 65535.
    """
    if number > PORT_MAX:
        raise ResourceError(f"{field}: {number} is not a port")
    return Port(number)
