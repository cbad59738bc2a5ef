from __future__ import annotations

import base64
import json
from ipaddress import ip_interface

import pytest
from hypothesis import given, strategies as st

from cni.plugin.addresses import event_addresses
from cni.plugin.errors import Code, PluginError


def test_the_reference_s_example() -> None:
    result = {"ips": [{"interface": 2, "address": "10.1.2.3/24"}]}
    assert json.dumps(event_addresses(result, "1.0.0")) == (
        '[{"Interface": 2, "Address": {"IP": "10.1.2.3", "Mask": "////AA=="}, "Gateway": ""}]'
    )


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.integers(0, 128))
def test_address_and_mask_are_those_of_the_text(address: object, length: int) -> None:
    length = min(length, 32 if ":" not in str(address) else 128)
    interface = ip_interface(f"{address}/{length}")
    converted = event_addresses({"ips": [{"address": f"{address}/{length}"}]}, "0.3.1")
    assert converted is not None
    network = converted[0]["Address"]
    assert isinstance(network, dict)
    assert ip_interface(f"{network['IP']}/{length}") == interface
    assert base64.b64decode(network["Mask"]) == interface.netmask.packed


@pytest.mark.parametrize("result", [{}, {"ips": None}, {"ips": []}, {"dns": {}}])
def test_a_result_without_addresses_has_none(result: dict[str, object]) -> None:
    assert event_addresses(result, "1.1.0") is None


def test_the_oldest_results_have_one_address_of_a_kind() -> None:
    result = {"ip6": {"ip": "fd00::1/64"}, "ip4": {"ip": "10.0.0.2/16", "gateway": "10.0.0.1"}}
    converted = event_addresses(result, "0.2.0")
    assert converted is not None
    assert [address["Address"]["IP"] for address in converted] == ["10.0.0.2", "fd00::1"]  # type: ignore[index]
    assert converted[0]["Gateway"] == "10.0.0.1"


@pytest.mark.parametrize(
    "ips",
    [
        {},
        ["10.0.0.1/8"],
        [{}],
        [{"address": None}],
        [{"address": "10.0.0.1"}],
        [{"address": "10.0.0.1/33"}],
        [{"address": "10.0.0.1/٣"}],
        [{"address": "10.0.0.1/"}],
        [{"address": "10.0.0.1/-1"}],
        [{"address": "fd00::1/129"}],
        [{"address": "\x00/8"}],
        [{"address": "10.0.0.1/8", "gateway": "nobody"}],
        [{"address": "10.0.0.1/8", "gateway": 7}],
        [{"address": "10.0.0.1/8", "interface": "eth0"}],
        [{"address": "10.0.0.1/8", "interface": True}],
    ],
)
def test_a_malformed_result_is_refused(ips: object) -> None:
    result = {"ips": ips or 1}
    with pytest.raises(PluginError) as caught:
        event_addresses(result, "1.0.0")
    assert caught.value.code is Code.UNDECODABLE
