"""Where a redirected datagram was going: ask the kernel's connection tracking (ctnetlink).

REDIRECT rewrites the destination before the datagram reaches its socket: IP_RECVORIGDSTADDR then
shows the rewritten one, and SO_ORIGINAL_DST knows TCP and SCTP only. The table of flows still has
it: we look up the flow by the way its answers go, from our socket to the client, and read the way
it began. The kernel answers inside `send`; a lookup costs about 10 us and never waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ztunnel.linux.netlink import HEADER, NLM_F_REQUEST, NLMSG_ERROR, messages_in
from ztunnel.model.network import Endpoint, Port, canonical

NETLINK_NETFILTER: Final = 12
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_FOUND = 1 << 8  # IPCTNL_MSG_CT_NEW
_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")
_NESTED, _KIND_MASK = 0x8000, 0x3FFF
_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2  # CTA_TUPLE_*
_ADDRESSES, _PORTS = 1, 2  # CTA_TUPLE_IP, CTA_TUPLE_PROTO
_V4_SOURCE, _V4_TARGET, _V6_SOURCE, _V6_TARGET = 1, 2, 3, 4  # CTA_IP_*
_PROTOCOL, _SOURCE_PORT, _TARGET_PORT = 1, 2, 3  # CTA_PROTO_*
_V4 = 4
_READ_BYTES = 8192


class Conntrack:
    """Looks up UDP flows of the namespace it was made in; needs CAP_NET_ADMIN there."""

    __slots__ = ("_sequence", "_sock")

    def __init__(self) -> None:
        """Open it in the calling thread's namespace.

        Raises:
            OSError: the kernel has no netfilter netlink, or we are out of descriptors.
        """
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._sock = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        self._sequence = 0
        try:
            self._sock.bind((0, 0))
        except OSError:
            self._sock.close()
            raise

    def close(self) -> None:
        """Close it; more than once is fine."""
        self._sock.close()

    def original_destination(self, *, client: Endpoint, local: Endpoint) -> Endpoint | None:
        """Say where `client` sent what we got at `local`; None if no flow is known.

        Raises:
            OSError: the kernel refused to say (no CAP_NET_ADMIN, no connection tracking).
        """
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        self._sock.send(_request(self._sequence, source=local, target=client))
        try:
            while True:
                for kind, _, sequence, body in messages_in(self._sock.recv(_READ_BYTES)):
                    if sequence != self._sequence:
                        continue  # the rest of an exchange that was cut short
                    if kind == _FOUND:
                        return _destination(body)
                    if kind == NLMSG_ERROR:
                        _check(-struct.unpack_from("=i", body)[0])
                        return None
        except BlockingIOError:
            return None


def _check(number: int) -> None:
    if number not in (0, errno.ENOENT):
        raise OSError(number, f"connection tracking: {os.strerror(number)}")


def _request(sequence: int, *, source: Endpoint, target: Endpoint) -> bytes:
    is_v4 = source.ip.version == _V4
    family = socket.AF_INET if is_v4 else socket.AF_INET6
    kinds = (_V4_SOURCE, _V4_TARGET) if is_v4 else (_V6_SOURCE, _V6_TARGET)
    ips = _attribute(kinds[0], source.ip.packed) + _attribute(kinds[1], target.ip.packed)
    ports = (
        _attribute(_PROTOCOL, bytes([socket.IPPROTO_UDP]))
        + _attribute(_SOURCE_PORT, source.port.to_bytes(2, "big"))
        + _attribute(_TARGET_PORT, target.port.to_bytes(2, "big"))
    )
    flow = _attribute(_ADDRESSES | _NESTED, ips) + _attribute(_PORTS | _NESTED, ports)
    body = _GENERIC.pack(family, 0, 0) + _attribute(_TUPLE_REPLY | _NESTED, flow)
    return HEADER.pack(HEADER.size + len(body), _GET, NLM_F_REQUEST, sequence, 0) + body


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def _attribute_in(data: bytes, wanted: int) -> bytes | None:
    """Find one attribute; what follows it is not looked at."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        if kind & _KIND_MASK == wanted:
            return data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return None


def _destination(body: bytes) -> Endpoint | None:
    """Read the destination of the original direction."""
    flow = _attribute_in(body[_GENERIC.size :], _TUPLE_ORIGINAL) or b""
    ports = _attribute_in(flow, _PORTS) or b""
    port = Port(int.from_bytes(_attribute_in(ports, _TARGET_PORT) or b"", "big"))
    ips = _attribute_in(flow, _ADDRESSES) or b""
    if packed := _attribute_in(ips, _V4_TARGET):
        return Endpoint(IPv4Address(packed), port)
    if packed := _attribute_in(ips, _V6_TARGET):
        return Endpoint(canonical(IPv6Address(packed)), port)
    return None
