from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_gateway, a_service, a_store, a_workload
from tests.support.picks import (
    CALLER,
    KEY,
    an_endpoint,
    balanced,
    chances,
    choose,
    endpoints,
    names,
    services,
)
from ztunnel.decide.balance import Purpose, pick
from ztunnel.decide.ranking import Ranking
from ztunnel.model.network import Port
from ztunnel.model.service import BalanceMode, HealthPolicy, LoadBalancer, Scope, Service
from ztunnel.model.workload import (
    ApplicationTunnel,
    AppProtocol,
    Health,
    Workload,
    WorkloadUid,
)
from ztunnel.state.endpoints import FOLLOWERS_MAX
from ztunnel.state.store import Store, Update

PREFERENCES = (Scope.NETWORK, Scope.REGION, Scope.ZONE)


# name -> place and network, and the rank the specification gives it for PREFERENCES
RANKED = {
    "5": ("r1/z1/s1", ""),
    "4": ("r1/z9/s1", ""),
    "3": ("r9/z1/s1", ""),
    "2": ("r1/z1/s1", "far"),
    "1": ("r1/z9/s1", "far"),
    "0": ("r9/z9/s1", "far"),
}


@pytest.mark.parametrize("best", ["5", "4", "3", "2", "1", "0"])
def test_failover_takes_the_highest_rank_there_is(best: str) -> None:
    there = [
        an_endpoint(name, place, network=network)
        for name, (place, network) in RANKED.items()
        if name <= best
    ]
    service = balanced(BalanceMode.FAILOVER, *PREFERENCES)
    assert names(a_store(service, *there), service) == {best}


def test_a_mismatch_stops_the_walk() -> None:
    service = balanced(BalanceMode.FAILOVER, Scope.REGION, Scope.NODE)
    elsewhere = an_endpoint("same node", "r9/z1/s1", node="n1")
    nearby = an_endpoint("same region", "r1/z9/s9", node="n9")
    assert names(a_store(service, elsewhere, nearby), service) == {"same region"}


@pytest.mark.parametrize(
    ("scope", "near", "far"),
    [
        (Scope.REGION, {"place": "r1/x/x"}, {"place": "x/z1/s1"}),
        (Scope.ZONE, {"place": "x/z1/x"}, {"place": "r1/x/s1"}),
        (Scope.SUBZONE, {"place": "x/x/s1"}, {"place": "r1/z1/x"}),
        (Scope.NODE, {"node": "n1"}, {"node": "n2"}),
        (Scope.CLUSTER, {"cluster_id": "c1"}, {"cluster_id": "c2"}),
        (Scope.NETWORK, {"network": ""}, {"network": "far"}),
    ],
)
def test_each_scope(scope: Scope, near: dict[str, str], far: dict[str, str]) -> None:
    for mode in (BalanceMode.STRICT, BalanceMode.FAILOVER):
        service = balanced(mode, scope)
        store = a_store(service, an_endpoint("near", **near), an_endpoint("far", **far))
        assert names(store, service) == {"near"}


def test_strict_takes_none_rather_than_a_worse_one() -> None:
    service = balanced(BalanceMode.STRICT, Scope.NODE)
    assert choose(a_store(service, an_endpoint("far", node="n2")), service) is None


def test_strict_network_first_wants_the_network_too() -> None:
    service = balanced(BalanceMode.STRICT, Scope.NETWORK, Scope.REGION)
    remote = an_endpoint("remote", "r1/z1/s1", network="far")
    assert choose(a_store(service, remote), service) is None


def test_standard_ignores_preferences() -> None:
    service = balanced(BalanceMode.STANDARD, Scope.NODE)
    store = a_store(service, an_endpoint("a", node="n1"), an_endpoint("b", node="n2"))
    assert names(store, service) == {"a", "b"}


def test_capacity_is_a_weight_and_zero_is_never() -> None:
    service = a_service()
    store = a_store(
        service,
        an_endpoint("never", capacity=0),
        an_endpoint("once", capacity=1),
        an_endpoint("nine", capacity=9),
        an_endpoint("nor", capacity=0),
    )
    rng = random.Random(7)
    drawn = Counter(
        found.workload.name
        for _ in range(2000)
        if (
            found := pick(
                store.services,
                service,
                Port(80),
                source=CALLER,
                purpose=Purpose.STANDARD,
                rng=rng,
            )
        )
    )
    assert set(drawn) == {"once", "nine"}
    assert 7 < drawn["nine"] / drawn["once"] < 11


def test_all_of_capacity_zero_is_nobody() -> None:
    service = a_service()
    assert choose(a_store(service, an_endpoint("a", capacity=0)), service) is None


@pytest.mark.parametrize(
    ("endpoint", "is_eligible"),
    [
        ({}, True),
        ({"ips": []}, False),
        ({"ips": [], "hostname": "db.example.org"}, True),
        ({"ips": [], "network": "far"}, False),
        ({"ips": [], "network": "far", "network_gateway": a_gateway("far/192.0.2.1")}, True),
        ({"ips": [], "network_gateway": a_gateway("/192.0.2.1")}, False),
        ({"health": Health.UNHEALTHY}, False),
    ],
)
def test_who_can_be_reached(endpoint: dict[str, Any], *, is_eligible: bool) -> None:
    service = a_service()
    assert bool(choose(a_store(service, an_endpoint("a", **endpoint)), service)) == is_eligible


TUNNEL = ApplicationTunnel(AppProtocol.PROXY, Port(15088))


def test_a_waypoint_may_serve_a_port_its_service_does_not_declare() -> None:
    service = a_service(port_map={})
    store = a_store(service, an_endpoint("a", services={KEY: {}}, application_tunnel=TUNNEL))
    assert choose(store, service, port=15008) is None
    found = choose(store, service, port=15008, purpose=Purpose.WAYPOINT)
    assert found is not None
    assert found.port == 15008


def test_a_named_port_skips_endpoints_that_lack_it() -> None:
    service = a_service(port_map={80: 0})
    store = a_store(
        service, an_endpoint("with"), an_endpoint("without", services={KEY: {81: 8081}})
    )
    assert names(store, service) == {"with"}


def test_a_pick_sees_every_change() -> None:
    service = a_service()
    store = a_store(service, an_endpoint("a"))
    assert names(store, service) == {"a"}
    store.apply(Update(workloads=[an_endpoint("b")]))
    assert names(store, service) == {"a", "b"}
    store.apply(Update(workloads=[an_endpoint("a", health=Health.UNHEALTHY)]))
    assert names(store, service) == {"b"}
    open_to_all = a_service(load_balancer=LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL))
    store.apply(Update(services=[open_to_all]))
    assert names(store, open_to_all) == {"a", "b"}
    store.apply(Update(removed_workloads=[WorkloadUid("b")]))
    assert names(store, open_to_all) == {"a"}


def test_what_is_remembered_for_one_question_is_not_the_answer_to_another() -> None:
    service = a_service(port_map={80: 8080, 81: 8081})
    gateway = a_gateway("far/192.0.2.1")
    store = a_store(
        service,
        an_endpoint("near", services={KEY: {}}),
        an_endpoint("far", ips=[], network="far", network_gateway=gateway),
    )
    assert names(store, service) == {"near", "far"}
    assert names(store, service, source=a_workload("there", network="far")) == {"near"}
    found = choose(store, service, port=81)
    assert found is not None
    assert found.port == 8081


def test_callers_in_many_places_do_not_fill_the_memory() -> None:
    service = balanced(BalanceMode.FAILOVER, Scope.NODE)
    store = a_store(service, an_endpoint("a", node="n7"))
    for number in range(FOLLOWERS_MAX + 5):
        caller = a_workload("caller", node=f"n{number}")
        assert choose(store, service, source=caller) is not None


@given(service=services, there=endpoints, seed=st.integers(0, 3))
def test_a_pick_is_always_an_eligible_endpoint(
    service: Service, there: list[Workload], seed: int
) -> None:
    found = choose(a_store(service, *there), service, seed)
    if found is None:
        return
    balancer = service.load_balancer
    takes_all = balancer is not None and balancer.health_policy is HealthPolicy.ALLOW_ALL
    assert found.workload.health is Health.HEALTHY or takes_all
    assert found.workload.capacity > 0
    assert found.workload.ips
    assert KEY in found.workload.services
    assert found.port > 0


CALLERS = [
    CALLER,
    an_endpoint("elsewhere", "r1/z2/s1", node="n2"),
    an_endpoint("far", "r2/z1/s1", network="far"),
]
an_update = st.builds(
    Update,
    workloads=endpoints,
    removed_workloads=st.lists(st.sampled_from("abcdefgh"), max_size=2),
    services=st.lists(services, max_size=1) | st.just([]),
)


@given(first=services, updates=st.lists(st.tuples(an_update, st.booleans()), max_size=8))
def test_what_keeps_up_with_changes_is_what_would_be_made_anew(
    first: Service, updates: list[tuple[Update, bool]]
) -> None:
    """Whoever asks, and however much has changed since somebody asked last."""
    store = a_store(first)
    for update, is_asked in updates:
        store.apply(update)
        if not is_asked:
            continue
        service = store.services.by_key(first.key)
        assert service is not None
        anew = a_store(service, *store.workloads.all())
        for caller in CALLERS:
            assert chances_of(store, service, caller) == chances_of(anew, service, caller)


def chances_of(store: Store, service: Service, caller: Workload) -> dict[str, Fraction]:
    def draw(rng: random.Random) -> Workload | None:
        found = pick(
            store.services,
            service,
            Port(80),
            source=caller,
            purpose=Purpose.STANDARD,
            rng=rng,
        )
        return None if found is None else found.workload

    return chances(draw)


def test_a_pick_after_a_change_looks_at_what_changed_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    sort = Ranking.sort

    def counted(self: Ranking, workloads: Iterable[Workload]) -> dict[int, list[Workload]]:
        there = list(workloads)
        looked.append(len(there))
        return sort(self, there)

    monkeypatch.setattr(Ranking, "sort", counted)
    service = balanced(BalanceMode.FAILOVER, Scope.NODE)
    far = [an_endpoint(f"far-{number}", node="n2") for number in range(1000)]
    near = [an_endpoint("near", node="n1", health=health) for health in Health]
    store = a_store(service, *far)
    for change in (*near, *near, *near):  # the only one of the best rank comes and goes
        store.apply(Update(workloads=[change]))
        assert choose(store, service) is not None
    assert looked[0] > 1000
    assert looked[1:] == [1] * 5
