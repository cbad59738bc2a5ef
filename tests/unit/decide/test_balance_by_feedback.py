"""Picks that take the caller's own connections into account."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from tests.support.builders import a_service, a_store
from tests.support.picks import (
    an_endpoint,
    balanced,
    choose,
    endpoints,
    names,
    services,
)
from ztunnel.decide.balance import COMPARED_MAX
from ztunnel.decide.feedback import Feedback
from ztunnel.model.network import Endpoint, Port, parse_ip
from ztunnel.model.service import BalanceMode, HealthPolicy, Scope, Service
from ztunnel.model.settings import Balancing
from ztunnel.model.workload import (
    Health,
    Workload,
)
from ztunnel.state.store import Update


def avoiding(*there: Workload, port: int = 8080) -> Feedback:
    feedback = Feedback()
    for workload in there:
        for ip in workload.ips:
            feedback.outliers.failed(Endpoint(ip, Port(port)), 0.0)
    return feedback


def at_ip(name: str, number: int, place: str = "r1/z1/s1", **more: Any) -> Workload:
    return an_endpoint(name, place, ips=[f"192.0.2.{number}"], **more)


def test_an_endpoint_that_could_not_be_reached_is_left_alone() -> None:
    service, bad, good = a_service(), at_ip("bad", 1), at_ip("good", 2)
    store = a_store(service, bad, good)
    assert names(store, service, feedback=avoiding(bad)) == {"good"}
    assert names(store, service, feedback=Feedback()) == {"bad", "good"}


def test_with_nothing_else_it_is_chosen_all_the_same() -> None:
    service, bad, worse = a_service(), at_ip("bad", 1), at_ip("worse", 2)
    store = a_store(service, bad, worse, at_ip("none", 3, capacity=0))
    assert names(store, service, feedback=avoiding(bad, worse)) == {"bad", "worse"}


def test_failover_goes_on_to_the_next_place_when_all_near_ones_are_avoided() -> None:
    service = balanced(BalanceMode.FAILOVER, Scope.REGION, Scope.ZONE)
    near, region, far = at_ip("near", 1), at_ip("region", 2, "r1/z9/s1"), at_ip("far", 3, "r9/z/s")
    store = a_store(service, near, region, far)
    assert names(store, service) == {"near"}
    assert names(store, service, feedback=avoiding(near)) == {"region"}
    assert names(store, service, feedback=avoiding(near, region)) == {"far"}
    assert names(store, service, feedback=avoiding(near, region, far)) == {"near"}
    store.apply(Update(workloads=[at_ip("new", 4, "r1/z9/s1")]))
    assert names(store, service, feedback=avoiding(near, region)) == {"new"}


def test_strict_stays_where_it_must_though_all_there_are_avoided() -> None:
    service = balanced(BalanceMode.STRICT, Scope.ZONE)
    near, far = at_ip("near", 1), at_ip("far", 2, "r1/z9/s1")
    assert names(a_store(service, near, far), service, feedback=avoiding(near)) == {"near"}


def test_one_good_endpoint_is_found_among_very_many_bad_ones() -> None:
    service = a_service()
    bad = [at_ip(f"bad-{number}", number) for number in range(1, 60)]
    store = a_store(service, *bad, at_ip("good", 99))
    assert names(store, service, feedback=avoiding(*bad)) == {"good"}


@pytest.mark.parametrize("count", [3, 20], ids=["all are compared", "two are compared"])
def test_least_connections_spread_evenly(count: int) -> None:
    service = a_service()
    store = a_store(service, *(at_ip(f"w-{number}", number + 1) for number in range(count)))
    feedback = Feedback(Balancing.LEAST_CONNECTIONS)
    taken: Counter[str] = Counter()
    for seed in range(10 * count):
        found = choose(store, service, seed, feedback=feedback)
        assert found is not None
        feedback.begun(found.workload)
        taken[found.workload.name] += 1
    assert max(taken.values()) - min(taken[f"w-{number}"] for number in range(count)) <= 5
    if count <= COMPARED_MAX:
        assert set(taken.values()) == {10}


def test_least_connections_are_by_capacity_and_avoid_too() -> None:
    service, small, large = a_service(), at_ip("small", 1), at_ip("large", 2, capacity=3)
    bad, off = at_ip("bad", 3, capacity=9), at_ip("off", 4, capacity=0)
    store = a_store(service, small, large, bad, off)
    feedback = Feedback(Balancing.LEAST_CONNECTIONS)
    feedback.outliers.failed(Endpoint(bad.ips[0], Port(8080)), 0.0)
    taken: Counter[str] = Counter()
    for seed in range(40):
        found = choose(store, service, seed, feedback=feedback)
        assert found is not None
        feedback.begun(found.workload)
        taken[found.workload.name] += 1
    assert taken == {"large": 30, "small": 10}


@given(
    service=services,
    there=endpoints,
    avoided=st.sets(st.sampled_from("abcdefgh")),
    balancing=st.sampled_from(Balancing),
    seed=st.integers(0, 3),
)
def test_feedback_never_adds_to_who_may_be_picked(
    service: Service,
    there: list[Workload],
    avoided: set[str],
    balancing: Balancing,
    seed: int,
) -> None:
    """Nobody is picked who is not eligible, an avoided one only if all of STRICT's are that."""
    there = [
        replace(one, ips=(parse_ip(f"192.0.2.{ord(one.name)}"),) if one.ips else ())
        for one in there
    ]
    feedback = Feedback(balancing)
    for name in avoided:
        for port in (8080, 80):
            feedback.outliers.failed(Endpoint(parse_ip(f"192.0.2.{ord(name)}"), Port(port)), 0.0)
    found = choose(a_store(service, *there), service, seed, feedback=feedback)
    without = choose(a_store(service, *there), service, seed)
    assert (found is None) == (without is None)
    if found is None:
        return
    others = [one for one in there if one.name not in avoided]
    other = choose(a_store(service, *others), service, seed)
    if found.workload.name in avoided:
        assert other is None
    balancer = service.load_balancer
    takes_all = balancer is not None and balancer.health_policy is HealthPolicy.ALLOW_ALL
    assert found.workload.health is Health.HEALTHY or takes_all
    assert found.workload.capacity > 0
