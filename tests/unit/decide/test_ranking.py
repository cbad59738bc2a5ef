from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_service
from tests.support.picks import CALLER, KEY, an_endpoint, balanced, endpoints, services
from ztunnel.decide.ranking import Ranking, is_behind_gateway, places, preferences_of, target_port
from ztunnel.model.network import Network, Port
from ztunnel.model.service import BalanceMode, HealthPolicy, Scope, Service
from ztunnel.model.workload import (
    ApplicationTunnel,
    AppProtocol,
    Health,
    ServiceKey,
    Workload,
)

TUNNEL = ApplicationTunnel(AppProtocol.PROXY, Port(15088))


@pytest.mark.parametrize(
    ("service_ports", "own_ports", "tunnel", "expected"),
    [
        ({80: 8080}, {80: 9090}, None, 9090),
        ({80: 8080}, {}, None, 8080),
        ({80: 0}, {80: 9090}, None, 9090),
        ({80: 0}, {81: 9090}, None, None),
        ({}, {}, None, None),
        ({}, {}, TUNNEL, 80),
        ({}, {}, ApplicationTunnel(AppProtocol.PROXY, None), None),
    ],
)
def test_the_port_on_the_workload(
    service_ports: dict[int, int],
    own_ports: dict[int, int],
    tunnel: ApplicationTunnel | None,
    expected: int | None,
) -> None:
    workload = an_endpoint("a", services={KEY: own_ports}, application_tunnel=tunnel)
    service = a_service(port_map=service_ports)
    assert target_port(service, service.key, Port(80), workload) == expected


def test_only_what_counts_in_the_mode_is_asked_of_a_caller() -> None:
    scopes = (Scope.NODE, Scope.REGION)
    assert places(balanced(BalanceMode.STRICT, *scopes), CALLER) == ("n1", "r1")
    for mode in (BalanceMode.STANDARD, BalanceMode.PASSTHROUGH):
        assert places(balanced(mode, *scopes), CALLER) == ()


# Against the rules of state-and-xds.md 10.4 and 10.5, asked of one endpoint after the other.


def seen_at(scope: Scope, workload: Workload) -> str:
    where = workload.locality
    return {
        Scope.REGION: where.region,
        Scope.ZONE: where.zone,
        Scope.SUBZONE: where.subzone,
        Scope.NODE: workload.node,
        Scope.CLUSTER: workload.cluster_id,
        Scope.NETWORK: workload.network,
    }[scope]


def is_eligible(service: Service, port: Port, caller: Workload, one: Workload) -> bool:
    balancer = service.load_balancer
    takes_all = balancer is not None and balancer.health_policy is HealthPolicy.ALLOW_ALL
    if one.health is not Health.HEALTHY and not takes_all:
        return False
    if not (one.ips or one.hostname or is_behind_gateway(one, caller.network)):
        return False
    if port not in service.ports and one.application_tunnel is None:
        return False
    return target_port(service, service.key, port, one) is not None


def rank_of(service: Service, port: Port, caller: Workload, one: Workload) -> int | None:
    if not is_eligible(service, port, caller, one):
        return None
    preferences = preferences_of(service)
    met = bonus = 0
    for position, scope in enumerate(preferences):
        is_network_first = position == 0 and scope is Scope.NETWORK
        if seen_at(scope, one) == seen_at(scope, caller):
            met += 1
            bonus += len(preferences) - 1 if is_network_first else 0
        elif not is_network_first:
            break
    is_strict = bool(preferences) and service.load_balancer is not None
    if is_strict and service.load_balancer.mode is BalanceMode.STRICT and met < len(preferences):
        return None
    return met + bonus


@given(
    service=services,
    there=endpoints,
    network=st.sampled_from(["", "far"]),
    tunnel=st.sampled_from([None, TUNNEL]),
    port=st.sampled_from([80, 15008]),
)
def test_all_at_once_are_ranked_as_one_after_the_other(
    service: Service,
    there: list[Workload],
    network: str,
    tunnel: ApplicationTunnel | None,
    port: int,
) -> None:
    caller = an_endpoint("caller", node="n1", cluster_id="c1", network=Network(network))
    there.append(an_endpoint("tunnel", application_tunnel=tunnel, services={KEY: {}}))
    ranking = Ranking(service, Port(port), caller.network, places(service, caller))
    expected: dict[int, list[Workload]] = {}
    for one in there:
        rank = rank_of(service, Port(port), caller, one)
        if rank is not None:
            expected.setdefault(rank, []).append(one)
    assert ranking.sort(there) == expected
    for one in there:
        rank = rank_of(service, Port(port), caller, one)
        assert ranking.sort([one]) == ({} if rank is None else {rank: [one]})
    assert service.key == ServiceKey(KEY)
