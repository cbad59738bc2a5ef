from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_vip
from ztunnel.model.network import (
    Endpoint,
    HostPort,
    IpAddress,
    Port,
    canonical,
    parse_ip,
    parse_port,
)


@given(ip=st.ip_addresses(v=4))
def test_a_mapped_address_is_the_v4_one(ip: IPv4Address) -> None:
    assert canonical(IPv6Address(f"::ffff:{ip}")) == ip
    assert canonical(ip) == ip
    assert parse_ip(f"::ffff:{ip}") == ip


def test_other_v6_addresses_stay_and_lose_their_zone() -> None:
    assert canonical(IPv6Address("2001:db8::1")) == IPv6Address("2001:db8::1")
    assert parse_ip("fe80::1%eth0") == IPv6Address("fe80::1")


@pytest.mark.parametrize(("text", "port"), [("0", 0), ("80", 80), ("65535", 65535)])
def test_a_port(text: str, port: int) -> None:
    assert parse_port(text) == port


@pytest.mark.parametrize("text", ["", "65536", "-1", "+1", " 1", "8_0", "٣", "0x1"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(ValueError, match="not a port"):
        parse_port(text)


@given(ip=st.ip_addresses(), port=st.integers(0, 65535))
def test_an_endpoint_that_is_printed_is_read_again(ip: IpAddress, port: int) -> None:
    endpoint = Endpoint(canonical(ip), Port(port))
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "192.0.2.1", "192.0.2.1:", ":80", "2001:db8::1:80", "[192.0.2.1]:80", "[::1]", "a:80"],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        Endpoint.parse(text)


def test_an_endpoint_of_a_socket_address_is_canonical() -> None:
    assert Endpoint.of(("::ffff:192.0.2.1", 80, 0, 0)) == Endpoint.parse("192.0.2.1:80")
    assert Endpoint.of(("fe80::1%eth0", 80, 0, 2)) == Endpoint.parse("[fe80::1]:80")


def test_how_names_and_networks_print() -> None:
    assert str(HostPort("cart.shop", Port(80))) == "cart.shop:80"
    assert str(a_vip("far/192.0.2.1")) == "far/192.0.2.1"
    assert str(a_vip("192.0.2.1")) == "/192.0.2.1"
