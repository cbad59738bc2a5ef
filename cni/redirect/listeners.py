"""Who listens inside a pod, asked of the kernel (sock_diag(7))."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from cni.redirect.apply import Enterable
from cni.redirect.errors import RedirectError
from cni.redirect.plan import INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT
from ztunnel.linux.netlink import HEADER, NLM_F_DUMP, NetlinkSocket

PROXY_PORTS = (OUTBOUND_PORT, INBOUND_PORT, TUNNEL_PORT)
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_LISTEN = 1 << 10  # TCP_LISTEN as a bit of `idiag_states`
# struct inet_diag_req_v2: family, protocol, extensions, padding, states, and a socket to match
_REQUEST = struct.Struct("=BBBxI48x")
_PORT_AT = 4  # in struct inet_diag_msg, after family, state, timer and retransmissions


def silent_ports(netns: Enterable, ports: Iterable[int] = PROXY_PORTS) -> list[int]:
    """Give those of the ports at which nobody listens in either family.

    Raises:
        RedirectError: the kernel does not say.
    """
    try:
        with netns.call(lambda: NetlinkSocket(_NETLINK_SOCK_DIAG)) as sock:
            open_ports = {
                int(struct.unpack_from("!H", body, _PORT_AT)[0])
                for family in (socket.AF_INET, socket.AF_INET6)
                for body in sock.dump(_request(family))
            }
    except OSError as exc:
        raise RedirectError(f"cannot read who listens: {exc}") from exc
    return [port for port in ports if port not in open_ports]


def _request(family: int) -> bytes:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _LISTEN)
    size, flags = HEADER.size + len(body), _NLM_F_REQUEST | NLM_F_DUMP
    return HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + body
