from __future__ import annotations

import pytest

from ztunnel.decide.classify import illegal_ports, is_inbound_self_call, is_outbound_self_call
from ztunnel.model.network import Endpoint

ILLEGAL = illegal_ports(has_socks5=False)


def test_the_socks5_port_counts_only_where_it_is_served() -> None:
    assert illegal_ports(has_socks5=False) == {15001, 15006, 15008}
    assert illegal_ports(has_socks5=True) == {15001, 15006, 15008, 15080}


@pytest.mark.parametrize(
    ("destination", "outbound", "inbound"),
    [
        ("127.0.0.1:15001", True, True),
        ("127.9.9.9:15006", True, True),
        ("[::1]:15008", True, True),
        ("0.0.0.0:15001", True, True),
        ("[::]:15006", True, True),
        ("192.0.2.1:15008", False, True),
        ("[2001:db8::1]:15001", False, True),
        ("127.0.0.1:15080", False, False),
        ("127.0.0.1:15053", False, False),
        ("192.0.2.1:8080", False, False),
    ],
)
def test_a_call_to_ourselves(destination: str, *, outbound: bool, inbound: bool) -> None:
    endpoint = Endpoint.parse(destination)
    assert is_outbound_self_call(endpoint, ILLEGAL) == outbound
    assert is_inbound_self_call(endpoint, ILLEGAL) == inbound
