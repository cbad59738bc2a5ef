"""Looking at the wire between nodes: what went over it, and could anybody read it.

A packet socket on a node's uplink hands out every frame; here the TCP payloads are counted by the
proxy's port and searched for texts that must, or must not, be readable.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from ztunnel.model.workload import HBONE_PORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.devmesh.cluster import Member

ETH_P_ALL = 0x0003  # linux/if_ether.h
ETH_HEADER = 14
IPV4, IPV6 = 0x0800, 0x86DD
TCP = 6
SNAPSHOT_BYTES = 65536
TLS_RECORD_KINDS = frozenset({20, 21, 22, 23})  # RFC 8446 s5.1
TLS_APPLICATION_DATA = 23
TLS13_ON_THE_WIRE = 0x0303
RECORD_HEADER = struct.Struct(">BHH")  # when a record begins where a segment does


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP segment."""

    source_port: int
    target_port: int
    payload: bytes

    @property
    def is_hbone(self) -> bool:
        """Whether it belongs to a tunnel, by its port."""
        return HBONE_PORT in (self.source_port, self.target_port)


@dataclass(slots=True)
class Tally:
    """What was seen."""

    segments: int = 0
    hbone_segments: int = 0
    hbone_bytes: int = 0
    tls_records: int = 0
    encrypted_records: int = 0
    readable: set[bytes] = field(default_factory=set)  # texts found outside tunnels
    leaked: set[bytes] = field(default_factory=set)  # texts found on the tunnel port


def parse(frame: bytes) -> Segment | None:
    """Take the TCP segment out of an Ethernet frame; None if it holds none."""
    (kind,) = struct.unpack_from(">H", frame, ETH_HEADER - 2)
    if kind == IPV4:
        start = ETH_HEADER + (frame[ETH_HEADER] & 0xF) * 4
        protocol = frame[ETH_HEADER + 9]
        end = ETH_HEADER + int(struct.unpack_from(">H", frame, ETH_HEADER + 2)[0])
    elif kind == IPV6:
        start = ETH_HEADER + 40
        protocol = frame[ETH_HEADER + 6]
        end = start + int(struct.unpack_from(">H", frame, ETH_HEADER + 4)[0])
    else:
        return None
    if protocol != TCP or len(frame) < start + 20:
        return None
    source, target = struct.unpack_from(">HH", frame, start)
    payload = start + (frame[start + 12] >> 4) * 4
    return Segment(source, target, frame[payload:end])


class WireTap:
    """Sees what a node sends and receives through `interface`."""

    def __init__(self, node: Member, interface: str = "uplink") -> None:
        sock = node.netns.call(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((interface, 0))
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._texts: tuple[bytes, ...] = ()
        self.tally = Tally()

    def look_for(self, texts: Sequence[bytes]) -> None:
        """Search for these from now on."""
        self._texts = (*self._texts, *texts)

    async def run(self) -> None:
        """Look at frames until cancelled."""
        with self._sock:
            while True:
                frame = await self._sock.recv(SNAPSHOT_BYTES)
                segment = parse(frame)
                if segment is not None:
                    self._count(segment)

    def _count(self, segment: Segment) -> None:
        tally = self.tally
        tally.segments += 1
        found = {text for text in self._texts if text in segment.payload}
        if not segment.is_hbone:
            tally.readable |= found
            return
        tally.leaked |= found
        tally.hbone_segments += 1
        tally.hbone_bytes += len(segment.payload)
        if len(segment.payload) >= RECORD_HEADER.size:
            kind, version, _ = RECORD_HEADER.unpack_from(segment.payload)
            if kind in TLS_RECORD_KINDS and version >> 8 == TLS13_ON_THE_WIRE >> 8:
                tally.tls_records += 1
                tally.encrypted_records += kind == TLS_APPLICATION_DATA
