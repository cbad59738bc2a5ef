from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import ResourceError
from ztunnel.wire.addresses import read_ip, read_network, read_port

MAPPED = ip_address("::ffff:192.0.2.7").packed


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (bytes([192, 0, 2, 7]), "192.0.2.7"),
        (ip_address("2001:db8::1").packed, "2001:db8::1"),
        pytest.param(MAPPED, "192.0.2.7", id="a mapped address is the address it maps"),
    ],
)
def test_packed_bytes_are_an_address(packed: bytes, text: str) -> None:
    assert read_ip(packed, "f") == ip_address(text)


@given(packed=st.binary(max_size=40).filter(lambda b: len(b) not in {4, 16}))
def test_other_lengths_are_refused_by_the_name_of_the_field(packed: bytes) -> None:
    with pytest.raises(ResourceError, match=r"^the\.field: \d+ bytes"):
        read_ip(packed, "the.field")


@pytest.mark.parametrize(
    ("packed", "length", "text"),
    [
        pytest.param(bytes([10, 1, 2, 3]), 8, "10.0.0.0/8", id="host bits are cut"),
        (bytes(4), 0, "0.0.0.0/0"),
        (ip_address("2001:db8::1").packed, 32, "2001:db8::/32"),
        pytest.param(MAPPED, 120, "192.0.2.0/24", id="a range of mapped addresses"),
        pytest.param(MAPPED, 80, "::/80", id="a range wider than the mapped addresses"),
    ],
)
def test_address_and_length_are_a_range(packed: bytes, length: int, text: str) -> None:
    assert read_network(packed, length, "f") == ip_network(text)


@pytest.mark.parametrize(("packed", "length"), [(bytes(4), 33), (bytes(16), 129), (bytes(3), 1)])
def test_what_is_no_range_is_refused(packed: bytes, length: int) -> None:
    with pytest.raises(ResourceError, match=r"^f: "):
        read_network(packed, length, "f")


def test_a_port_has_sixteen_bits() -> None:
    assert read_port(65535, "f") == 65535
    with pytest.raises(ResourceError, match="f: 65536"):
        read_port(65536, "f")
