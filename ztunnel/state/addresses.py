"""Addresses as dictionary keys: `ipaddress` objects hash by formatting themselves, ints do not."""

from __future__ import annotations

from ipaddress import IPv4Address

from ztunnel.model.network import IpAddress, IpNetwork

_V6_MARK = 1 << 128  # above every IPv6 address, so the two families never share a key
V4_BITS = 32
V6_BITS = 128


def address_key(ip: IpAddress) -> int:
    """Return a number unique to `ip` among both families."""
    return int(ip) if isinstance(ip, IPv4Address) else int(ip) | _V6_MARK


def prefix_shape(cidr: IpNetwork) -> tuple[int, int]:
    """Return (address bits, prefix length): all ranges of one shape share one dictionary."""
    return cidr.max_prefixlen, cidr.prefixlen


def masked(ip: IpAddress, length: int) -> int:
    """Return the first `length` bits of `ip` as a number."""
    bits = V4_BITS if isinstance(ip, IPv4Address) else V6_BITS
    return int(ip) >> (bits - length)


def address_bits(ip: IpAddress) -> int:
    """Return 32 or 128."""
    return V4_BITS if isinstance(ip, IPv4Address) else V6_BITS
