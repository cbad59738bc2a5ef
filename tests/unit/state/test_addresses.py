from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

from hypothesis import given, strategies as st

from ztunnel.model.network import IpAddress, IpNetwork
from ztunnel.state.addresses import address_bits, address_key, masked, prefix_shape

addresses = st.ip_addresses()


@given(one=addresses, other=addresses)
def test_keys_are_equal_only_for_equal_addresses(one: IpAddress, other: IpAddress) -> None:
    assert (address_key(one) == address_key(other)) == (one == other)


def test_the_same_number_in_both_families_has_two_keys() -> None:
    assert address_key(IPv4Address(1)) != address_key(IPv6Address(1))


@given(ip=addresses, data=st.data())
def test_a_masked_address_is_its_network(ip: IpAddress, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, address_bits(ip)))
    cidr: IpNetwork = ip_network((ip, length), strict=False)
    assert prefix_shape(cidr) == (address_bits(ip), length)
    assert masked(ip, length) == masked(cidr.network_address, length)
    assert masked(ip, length) << (address_bits(ip) - length) == int(cidr.network_address)
