"""Where a redirected datagram was going: ask the kernel's connection tracking (ctnetlink).

REDIRECT rewrites the destination before the datagram reaches its socket: IP_RECVORIGDSTADDR then
shows the rewritten one, and SO_ORIGINAL_DST knows TCP and SCTP only. The table of flows still has
it: we look up the flow by the way its answers go, from our socket to the client, and read the way
it began. The kernel answers inside `send`; a lookup costs some 15 us and never waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from ipaddress import ip_address
from operator import itemgetter
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
_V4_BYTE = bytes([socket.AF_INET])
_ADDRESS_BYTES = (4, 16)
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


class _Family:
    """How a flow looks in one IP version: what the kernel writes, and what we ask by."""

    __slots__ = ("_layout", "number", "shape")

    def __init__(self, number: int, *, size: int, source: int, target: int) -> None:
        """Lay out addresses of `size` bytes, whose attributes have these kinds."""
        self.number = number
        self._layout = struct.Struct(f"=HHHHHH{size}sHH{size}sHHHHB3xHH2s2xHH2s2x")
        length = _ATTRIBUTE.size + size
        self.shape = (
            *(_ATTRIBUTE.size + 2 * length, _ADDRESSES | _NESTED, length, source, length, target),
            *(_ATTRIBUTE.size + 24, _PORTS | _NESTED, 5, _PROTOCOL, socket.IPPROTO_UDP),
            *(6, _SOURCE_PORT, 6, _TARGET_PORT),
        )

    def reply(self, source: Endpoint, target: Endpoint) -> bytes:
        """Write the tuple of answers from `source` to `target`."""
        layout, shape = self._layout, self.shape
        return layout.pack(
            *(layout.size, _TUPLE_REPLY | _NESTED, *shape[:4], source.ip.packed),
            *(*shape[4:6], target.ip.packed, *shape[6:13], source.port.to_bytes(2, "big")),
            *(*shape[13:], target.port.to_bytes(2, "big")),
        )

    def destination(self, body: bytes) -> tuple[bytes, bytes] | None:
        """Read address and port of the original direction; None if they are elsewhere."""
        if len(body) < _GENERIC.size + self._layout.size:
            return None
        fields = self._layout.unpack_from(body, _GENERIC.size)
        if fields[1] & _KIND_MASK != _TUPLE_ORIGINAL or _shape_of(fields) != self.shape:
            return None
        return fields[9], fields[-1]


_shape_of = itemgetter(2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 18, 19)
_FAMILY_V4 = _Family(socket.AF_INET, size=4, source=_V4_SOURCE, target=_V4_TARGET)
_FAMILY_V6 = _Family(socket.AF_INET6, size=16, source=_V6_SOURCE, target=_V6_TARGET)


def _request(sequence: int, *, source: Endpoint, target: Endpoint) -> bytes:
    family = _FAMILY_V4 if source.ip.version == _V4 else _FAMILY_V6
    flow = family.reply(source, target)
    length = HEADER.size + _GENERIC.size + len(flow)
    head = HEADER.pack(length, _GET, NLM_F_REQUEST, sequence, 0)
    return head + _GENERIC.pack(family.number, 0, 0) + flow


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
    family = _FAMILY_V4 if body[:1] == _V4_BYTE else _FAMILY_V6
    found = family.destination(body) or _destination_anywhere(body)
    if found is None:
        return None
    packed, port = found
    ip = ip_address(packed)
    return Endpoint(canonical(ip), Port(int.from_bytes(port, "big")))


def _destination_anywhere(body: bytes) -> tuple[bytes, bytes] | None:
    """Read address and port from attributes in whatever order; eight times as slow."""
    flow = _attribute_in(body[_GENERIC.size :], _TUPLE_ORIGINAL) or b""
    ports = _attribute_in(flow, _PORTS) or b""
    ips = _attribute_in(flow, _ADDRESSES) or b""
    packed = _attribute_in(ips, _V4_TARGET) or _attribute_in(ips, _V6_TARGET)
    if packed is None or len(packed) not in _ADDRESS_BYTES:
        return None
    return packed, _attribute_in(ports, _TARGET_PORT) or b""
