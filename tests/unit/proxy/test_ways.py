"""Ways that are kept, and those that must not be."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.support.builders import a_service, a_workload, an_identity
from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.model.network import Endpoint
from ztunnel.proxy import ways as module
from ztunnel.proxy.labels import describe_hop
from ztunnel.proxy.ways import Way, Ways

TARGET = Endpoint.parse("192.0.2.10:8080")
TO_POD = Hop(protocol=HopProtocol.HBONE, peer=Endpoint.parse("192.0.2.10:15008"))
CHOSEN = Hop(
    protocol=HopProtocol.HBONE,
    peer=Endpoint.parse("192.0.2.10:15008"),
    service=a_service("cart.shop.svc.cluster.local"),
)
ELSEWHERE = Hop(protocol=HopProtocol.HBONE, peer=Endpoint.parse("192.0.2.99:15008"))
IDENTITY = an_identity("a")
CALLER, OTHER_CALLER = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def test_a_way_is_found_again_as_long_as_the_state_is_the_same() -> None:
    ways = Ways()
    assert ways.find(TARGET, CALLER, 1) is None
    way = Way(TO_POD, CALLER)
    ways.keep(TARGET, way)
    assert ways.find(TARGET, CALLER, 1) is way
    assert ways.find(TARGET, CALLER, 2) is None
    assert ways.find(TARGET, CALLER, 1) is None  # nor when an old number comes back


def test_another_caller_or_port_is_another_question() -> None:
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    ways.keep(TARGET, Way(TO_POD, CALLER))
    assert ways.find(TARGET, OTHER_CALLER, 1) is None
    assert ways.find(Endpoint.parse("192.0.2.10:8081"), CALLER, 1) is None


def test_callers_from_different_addresses_share_what_does_not_depend_on_them() -> None:
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    description = describe_hop(IDENTITY, a_workload("a"), TO_POD)
    ways.keep(TARGET, Way(TO_POD, CALLER, description=description))
    other = ways.keep(TARGET, Way(replace(TO_POD), OTHER_CALLER))
    assert other.hop is TO_POD
    assert other.description is description
    assert other.source_ip == OTHER_CALLER
    moved = ways.keep(TARGET, Way(replace(TO_POD, authority=TARGET), CALLER))
    assert moved.description is None


@pytest.mark.parametrize("hop", [CHOSEN, ELSEWHERE], ids=["a service's", "a gateway's"])
def test_what_was_chosen_among_several_is_chosen_anew_each_time(hop: Hop) -> None:
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    ways.keep(TARGET, Way(hop, CALLER))
    assert ways.find(TARGET, CALLER, 1) is None


def test_calling_ever_new_targets_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAYS_MAX", 3)
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    for port in range(1, 100):
        ways.keep(Endpoint.parse(f"192.0.2.10:{port}"), Way(TO_POD, CALLER))
    kept = [ways.find(Endpoint.parse(f"192.0.2.10:{port}"), CALLER, 1) for port in range(1, 100)]
    assert 0 < sum(way is not None for way in kept) <= 3


@pytest.mark.parametrize("hop", [CHOSEN, ELSEWHERE], ids=["a service's", "a gateway's"])
def test_what_follows_from_a_choice_is_shared_by_those_who_chose_the_same(hop: Hop) -> None:
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    way = ways.keep(TARGET, Way(hop, CALLER))
    assert ways.keep(TARGET, Way(replace(hop), CALLER)) is way
    for another in (
        Way(hop, OTHER_CALLER),
        Way(replace(hop, authority=TARGET), CALLER),
        Way(replace(hop, peer=Endpoint.parse("192.0.2.11:15008")), CALLER),
    ):
        assert ways.keep(TARGET, another) is another
    way = ways.keep(TARGET, Way(hop, CALLER))
    assert ways.keep(Endpoint.parse("192.0.2.10:8081"), Way(hop, CALLER)) is not way
    ways.find(TARGET, CALLER, 2)
    assert ways.keep(TARGET, Way(hop, CALLER)) is not way


def test_ever_new_choices_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAYS_MAX", 3)
    ways = Ways()
    ways.find(TARGET, CALLER, 1)
    peers = [Endpoint.parse(f"192.0.2.10:{port}") for port in range(1, 100)]
    made = [ways.keep(TARGET, Way(replace(CHOSEN, peer=peer), CALLER)) for peer in peers]
    again = [ways.keep(TARGET, Way(replace(CHOSEN, peer=peer), CALLER)) for peer in reversed(peers)]
    assert sum(one is two for one, two in zip(made, reversed(again), strict=True)) <= 3
