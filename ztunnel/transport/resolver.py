"""Names of workloads that have no address, through the node's own resolver (dataplane.md 2.6)."""

from __future__ import annotations

import socket

import trio

from ztunnel.model.network import IpAddress, parse_ip

RESOLVE_SECONDS = 5.0


async def resolve(hostname: str, *, ipv6: bool = True) -> list[IpAddress] | None:
    """Give the addresses of a host name; None if it could not be resolved in time."""
    family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
    with trio.move_on_after(RESOLVE_SECONDS):
        try:
            found = await trio.socket.getaddrinfo(hostname, None, family, socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # the latter: what is no host name at all
            return None
        return list(dict.fromkeys(parse_ip(str(entry[4][0])) for entry in found))
    return None
