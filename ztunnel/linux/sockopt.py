"""Socket options that Python or trio do not wrap, with their numbers (dataplane.md 1.2 to 1.4)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from ztunnel.model.network import Endpoint, IpAddress, Port, canonical, ip_text

# Python 3.11 lacks names for these.
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
IP6T_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv6/ip6_tables.h
IP_FREEBIND = 15  # linux/in.h
IP_TRANSPARENT = 19  # linux/in.h
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
IPV6_TRANSPARENT = 75  # linux/in6.h
IPV6_FREEBIND = 78  # linux/in6.h

IPV6 = 6
SOCKADDR_IN_BYTES = 16
SOCKADDR_IN6_BYTES = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepaliveSettings:
    """When the kernel probes a silent connection, and when it gives up; seconds."""

    idle_seconds: int = 180
    interval_seconds: int = 180
    retries: int = 9

    @property
    def user_timeout_seconds(self) -> int:
        """Return how long unacknowledged data may stay so: as long as keepalive would wait."""
        return self.idle_seconds + self.retries * self.interval_seconds


def original_destination(sock: socket.socket) -> Endpoint:
    """Read where a redirected connection was going, canonical.

    Falls back to the local address, which is the destination when nothing was rewritten.
    """
    if raw := _option(sock, socket.SOL_IP, SO_ORIGINAL_DST, SOCKADDR_IN_BYTES):
        return _v4_endpoint(raw[2:8])
    if raw := _option(sock, socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, SOCKADDR_IN6_BYTES):
        port = Port(int.from_bytes(raw[2:4], "big"))
        return Endpoint(canonical(IPv6Address(raw[8:24])), port)
    return Endpoint.of(sock.getsockname())


@lru_cache(maxsize=4096)
def _v4_endpoint(raw: bytes) -> Endpoint:
    """Read port and address in network order; remembered, as a node has few destinations."""
    return Endpoint(IPv4Address(raw[2:]), Port(int.from_bytes(raw[:2], "big")))


def _option(sock: socket.socket, level: int, name: int, size: int) -> bytes | None:
    try:
        return sock.getsockopt(level, name, size)
    except OSError:
        # Not redirected, of the other family, or nothing here tracks connections.
        return None


def set_mark(sock: socket.socket, mark: int) -> None:
    """Mark every packet of the socket; needs CAP_NET_ADMIN.

    Raises:
        OSError: the capability is missing.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)


def set_transparent(sock: socket.socket, version: int) -> None:
    """Let the socket use addresses of an IP version that are not ours.

    It needs CAP_NET_ADMIN or CAP_NET_RAW.

    Raises:
        OSError: the capability is missing.
    """
    if version == IPV6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)


def set_listener_transparent(sock: socket.socket) -> None:
    """Set the IPv4 option only, also on a dual-stack listener, as the reference does (1.4).

    Raises:
        OSError: the capability is missing.
    """
    sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)


def is_transparent(sock: socket.socket) -> bool:
    """Say whether a listener may hand out other addresses than its own."""
    return sock.getsockopt(socket.SOL_IP, IP_TRANSPARENT) == 1


def set_freebind(sock: socket.socket, version: int) -> None:
    """Let the socket bind to an address of an IP version that is not configured here."""
    if version == IPV6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)


def bind_address_no_port(sock: socket.socket) -> None:
    """Choose the port of a bound address at connect time.

    The kernel then only needs the four-tuple to be free, not the port: without it 28 000
    connections from one spoofed address use up all ephemeral ports.
    """
    sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)


def bind_as(sock: socket.socket, ip: IpAddress) -> None:
    """Speak with another's source address, any port (dataplane.md 1.4, case 3).

    Raises:
        OSError: a capability is missing, or `ip` is of another family than the socket.
    """
    set_transparent(sock, ip.version)
    set_freebind(sock, ip.version)
    bind_address_no_port(sock)
    sock.bind((ip_text(ip), 0))


def set_keepalive(sock: socket.socket, settings: KeepaliveSettings) -> None:
    """Probe the peer when the connection is silent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, settings.idle_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, settings.interval_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, settings.retries)


def set_user_timeout(sock: socket.socket, seconds: int) -> None:
    """Break the connection when sent data stays unacknowledged for so long."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)


def reset_on_close(sock: socket.socket) -> None:
    """Make `close` send a reset, so that the peer sees an abort and not an orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
