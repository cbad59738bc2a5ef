from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload
from ztunnel.decide.waypoint import choose_waypoint, is_waypoint_of, waypoints_of
from ztunnel.model.network import parse_ip
from ztunnel.model.service import WeightedWaypoint
from ztunnel.model.workload import Workload

ONE, TWO, THREE = (a_gateway(f"/192.0.2.{last}") for last in (1, 2, 3))
KEY = "shop/waypoint.example.com"
WAYPOINT = a_workload("waypoint", sa="waypoint", ips=["192.0.2.1"], services={KEY: {15008: 15008}})
TWIN = a_workload("twin", sa="waypoint", ips=["192.0.2.2"], services={KEY: {15008: 15008}})
WAYPOINT_SERVICE = a_service("waypoint.example.com")


def weighted(**weights: int) -> tuple[WeightedWaypoint, ...]:
    gateways = {"one": ONE, "two": TWO, "three": THREE}
    return tuple(WeightedWaypoint(gateways[name], weight) for name, weight in weights.items())


def test_waypoints_are_drawn_by_weight() -> None:
    service = a_service(weighted_waypoints=weighted(one=1, two=0, three=3), waypoint=TWO)
    rng = random.Random(5)
    drawn = Counter(str(choose_waypoint(service, rng)) for _ in range(1000))
    assert set(drawn) == {str(ONE), str(THREE)}
    assert 2 < drawn[str(THREE)] / drawn[str(ONE)] < 4


def test_without_weight_the_single_one_or_none() -> None:
    rng = random.Random(0)
    zero = weighted(one=0)
    assert choose_waypoint(a_service(weighted_waypoints=zero, waypoint=TWO), rng) == TWO
    assert choose_waypoint(a_service(weighted_waypoints=zero), rng) is None
    assert choose_waypoint(a_service(waypoint=TWO), rng) == TWO
    assert choose_waypoint(a_service(), rng) is None


def test_all_waypoints_of_an_owner() -> None:
    service = a_service(waypoint=THREE, weighted_waypoints=weighted(one=1, two=0))
    assert list(waypoints_of(service)) == [THREE, ONE]
    assert list(waypoints_of(a_workload(waypoint=TWO))) == [TWO]
    assert list(waypoints_of(a_workload())) == []


@pytest.mark.parametrize(
    ("source", "source_ip", "is_it"),
    [
        pytest.param(WAYPOINT, "192.0.2.1", True, id="the waypoint"),
        pytest.param(WAYPOINT, "192.0.2.9", False, id="not from its address"),
        pytest.param(TWIN, "192.0.2.2", True, id="another pod of the same waypoint"),
        pytest.param(TWIN, "192.0.2.1", True, id="same identity, the other's address"),
        pytest.param(
            a_workload("thief", sa="thief", ips=["192.0.2.1"]),
            "192.0.2.1",
            False,
            id="its address with another identity",
        ),
        pytest.param(
            a_workload("job", sa="waypoint", ips=["192.0.2.8"]),
            "192.0.2.8",
            False,
            id="its identity but not in the service",
        ),
    ],
)
def test_who_is_the_waypoint(source: Workload, source_ip: str, *, is_it: bool) -> None:
    store = a_store(WAYPOINT, TWIN, WAYPOINT_SERVICE)
    owner = a_service(waypoint=a_gateway(KEY))
    assert is_waypoint_of(store, owner, source, parse_ip(source_ip)) == is_it


def test_nobody_is_the_waypoint_of_who_has_none() -> None:
    store = a_store(WAYPOINT)
    assert not is_waypoint_of(store, a_service(), WAYPOINT, parse_ip("192.0.2.1"))
