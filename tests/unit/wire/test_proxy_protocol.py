from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import an_identity
from ztunnel.model.network import Endpoint, Port
from ztunnel.wire.proxy_protocol import proxy_header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4, OTHER_V4 = Endpoint.parse("192.0.2.1:40000"), Endpoint.parse("192.0.2.10:80")
V6, OTHER_V6 = Endpoint.parse("[2001:db8::1]:40000"), Endpoint.parse("[2001:db8::2]:80")
FAMILIES = {0x01: 0, 0x11: 4, 0x21: 16}  # to the bytes of an address


def read(header: bytes) -> tuple[int, bytes, dict[int, bytes]]:
    """Read a header as a waypoint would: family, address block, fields."""
    assert header[:12] == SIGNATURE
    version, family, size = struct.unpack(">BBH", header[12:16])
    assert version == 0x21
    assert len(header) == 16 + size
    block = 2 * FAMILIES[family] + 4 if FAMILIES[family] else 0
    fields, rest = {}, header[16 + block :]
    while rest:
        kind, length = struct.unpack(">BH", rest[:3])
        fields[kind] = rest[3 : 3 + length]
        rest = rest[3 + length :]
    return family, header[16 : 16 + block], fields


def test_an_ipv4_connection_byte_for_byte() -> None:
    assert proxy_header(V4, OTHER_V4, identity=None, host=None) == SIGNATURE + bytes.fromhex(
        "21 11 000c c0000201 c000020a 9c40 0050"
    )


def test_an_ipv6_connection_byte_for_byte() -> None:
    assert proxy_header(V6, OTHER_V6, identity=None, host=None) == SIGNATURE + bytes.fromhex(
        "21 21 0024 20010db8000000000000000000000001 20010db8000000000000000000000002 9c40 0050"
    )


def test_who_calls_and_whom_it_meant_are_fields_of_their_own() -> None:
    _, _, fields = read(proxy_header(V4, OTHER_V4, identity=an_identity(), host="cart.shop"))
    assert fields == {
        0xD0: b"spiffe://cluster.local/ns/shop/sa/frontend",
        0xD1: b"cart.shop",
    }


@pytest.mark.parametrize("host", [None, ""])
def test_without_a_name_there_is_no_field_for_it(host: str | None) -> None:
    assert read(proxy_header(V4, OTHER_V4, identity=None, host=host))[2] == {}


def test_two_families_have_no_common_address_block() -> None:
    family, block, fields = read(proxy_header(V4, OTHER_V6, identity=an_identity(), host=None))
    assert (family, block) == (0x01, b"")
    assert 0xD0 in fields


@given(
    ips=st.lists(st.ip_addresses(), min_size=2, max_size=2),
    ports=st.tuples(*[st.integers(0, 65535)] * 2),
    host=st.text(st.characters(max_codepoint=127, min_codepoint=33), max_size=253),
)
def test_whatever_the_ends_are_the_header_can_be_read_back(ips, ports, host) -> None:
    source, destination = (Endpoint(ip, Port(port)) for ip, port in zip(ips, ports, strict=True))
    family, block, fields = read(proxy_header(source, destination, identity=None, host=host))
    size = FAMILIES[family]
    if ips[0].version == ips[1].version:
        assert block[:size] == ips[0].packed
        assert block[size : 2 * size] == ips[1].packed
        assert struct.unpack(">HH", block[2 * size :]) == ports
    assert fields.get(0xD1, b"").decode() == host
