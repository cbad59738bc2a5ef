from __future__ import annotations

from hypothesis import given, settings

from tests.support import xds_nouns
from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.model.policy import Policy
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload
from ztunnel.wire.encode_resources import aliases_of, encode, type_of
from ztunnel.wire.policies import read_policy
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, read_address


@settings(max_examples=60)
@given(workload=xds_nouns.workloads)
def test_a_workload_comes_back_as_it_was(workload: Workload) -> None:
    notes: list[str] = []
    assert read_address(encode(workload), notes) == workload
    assert notes == []


@settings(max_examples=60)
@given(service=xds_nouns.services)
def test_a_service_comes_back_as_it_was(service: Service) -> None:
    notes: list[str] = []
    assert read_address(encode(service), notes) == service
    assert notes == []


@settings(max_examples=60)
@given(policy=xds_nouns.policies)
def test_a_policy_comes_back_as_it_was(policy: Policy) -> None:
    assert read_policy(encode(policy), []) == policy


def test_equal_resources_have_equal_bytes() -> None:
    services = {"shop/a": {80: 1}, "shop/b": {81: 2}}
    turned = dict(reversed(services.items()))
    assert encode(a_workload(services=services)) == encode(a_workload(services=turned))


def test_an_address_can_be_asked_for_by_other_names() -> None:
    assert aliases_of(a_workload(ips=["10.0.0.1"], network="west")) == ["west/10.0.0.1"]
    service = a_service(vips=["/10.0.0.2"], cidrs=["10.1.0.0/16"])
    assert aliases_of(service) == ["/10.0.0.2", "/10.1.0.0/16"]
    assert aliases_of(a_policy()) == []


def test_what_is_sent_under_which_type() -> None:
    assert type_of(a_workload()) == type_of(a_service()) == ADDRESS_TYPE
    assert type_of(a_policy()) == AUTHORIZATION_TYPE
