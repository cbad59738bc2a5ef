from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from ztunnel.devmesh.wire_tap import Tally, WireTap, parse

ETHERNET = bytes(12)


def tcp(payload: bytes, *, source: int = 40000, target: int = 8080) -> bytes:
    return struct.pack(">HHIIBBHHH", source, target, 0, 0, 5 << 4, 0x18, 100, 0, 0) + payload


def over_ipv4(segment: bytes, *, protocol: int = 6, options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack(
        ">BBHHHBBH4s4s",
        0x40 | words, 0, words * 4 + len(segment), 0, 0, 64, protocol, 0,
        ip_address("10.0.0.1").packed, ip_address("10.0.0.2").packed,
    )  # fmt: skip
    return ETHERNET + b"\x08\x00" + head + options + segment


def over_ipv6(segment: bytes) -> bytes:
    addresses = ip_address("fd00::1").packed + ip_address("fd00::2").packed
    head = struct.pack(">IHBB", 6 << 28, len(segment), 6, 64) + addresses
    return ETHERNET + b"\x86\xdd" + head + segment


@pytest.mark.parametrize(
    "frame",
    [
        over_ipv4(tcp(b"hello")),
        over_ipv4(tcp(b"hello"), options=bytes(8)),
        over_ipv4(tcp(b"hello")) + bytes(20),
        over_ipv6(tcp(b"hello")),
    ],
    ids=["IPv4", "IPv4 with options", "padded by Ethernet", "IPv6"],
)
def test_the_payload_of_a_segment_is_found(frame: bytes) -> None:
    segment = parse(frame)
    assert segment is not None
    assert segment.payload == b"hello"
    assert not segment.is_hbone


@pytest.mark.parametrize(
    "frame",
    [over_ipv4(b"x" * 8, protocol=17), ETHERNET + b"\x08\x06" + bytes(28), over_ipv4(b"")],
    ids=["UDP", "ARP", "cut short"],
)
def test_other_frames_are_none(frame: bytes) -> None:
    assert parse(frame) is None


def a_tap(*texts: bytes) -> WireTap:
    tap = WireTap.__new__(WireTap)
    tap._texts = texts
    tap.tally = Tally()
    return tap


def count(tap: WireTap, payload: bytes, target: int) -> None:
    segment = parse(over_ipv4(tcp(payload, target=target)))
    assert segment is not None
    tap._count(segment)


def test_a_text_is_readable_outside_tunnels_and_leaked_inside() -> None:
    tap = a_tap(b"secret")
    count(tap, b"a secret here", 8080)
    assert tap.tally.readable == {b"secret"}
    assert tap.tally.leaked == set()
    count(tap, b"a secret here", 15008)
    assert tap.tally.leaked == {b"secret"}


def test_tls_records_are_told_from_other_bytes() -> None:
    tap = a_tap()
    count(tap, b"\x17\x03\x03\x00\x10" + bytes(16), 15008)
    count(tap, b"\x16\x03\x01\x00\x10" + bytes(16), 15008)
    count(tap, b"GET / HTTP/1.1", 15008)
    assert (tap.tally.tls_records, tap.tally.encrypted_records) == (2, 1)
    assert tap.tally.hbone_segments == 3
