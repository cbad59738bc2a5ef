from __future__ import annotations

import pytest
import yaml

from tests.support.builders import a_gateway, a_vip
from ztunnel.devmesh.kubernetes_services import (
    GATEWAY_NAME_LABEL,
    Waypoints,
    read_service,
    selector_of,
    served_ports,
    waypoint_service,
)
from ztunnel.errors import ResourceError
from ztunnel.model.service import (
    BalanceMode,
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Scope,
    Service,
)

ZONE = (Scope.NETWORK, Scope.REGION, Scope.ZONE)


def read(text: str) -> Service:
    return read_service("cart", "shop", yaml.safe_load(text), waypoint=None, domain="lab.test")


def test_a_service_has_its_name_addresses_and_ports() -> None:
    service = read("""
        clusterIP: 10.0.0.1
        clusterIPs: [10.0.0.1, "2001:db8::1"]
        ipFamilies: [IPv4, IPv6]
        ports:
        - {port: 80, targetPort: 8080}
        - {port: 81}
        - {port: 443, targetPort: https}
        - {port: 53, protocol: UDP}
    """)
    assert service.key == "shop/cart.shop.svc.lab.test"
    assert service.vips == (a_vip("10.0.0.1"), a_vip("2001:db8::1"))
    assert service.ports == {80: 8080, 81: 81, 443: 0}
    assert service.ip_families is IpFamilies.DUAL
    assert service.canonical


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('clusterIPs: [10.0.0.1, "2001:db8::1"]', IpFamilies.DUAL),
        ("clusterIP: 10.0.0.1", IpFamilies.IPV4_ONLY),
        ('clusterIP: "2001:db8::1"', IpFamilies.IPV6_ONLY),
        ("clusterIP: None", None),
        ('{clusterIPs: [10.0.0.1, "2001:db8::1"], ipFamilies: [IPv4]}', IpFamilies.IPV4_ONLY),
    ],
)
def test_families_follow_from_the_addresses_unless_they_are_given(
    text: str, wanted: IpFamilies | None
) -> None:
    assert read(text).ip_families is wanted


@pytest.mark.parametrize("text", ["clusterIP: None", "clusterIP: ''", "ports: []"])
def test_a_headless_service_has_no_address(text: str) -> None:
    assert read(text).vips == ()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{}", None),
        ("internalTrafficPolicy: Local", LoadBalancer((Scope.NODE,), BalanceMode.STRICT)),
        ("internalTrafficPolicy: Cluster", None),
        ("trafficDistribution: PreferClose", LoadBalancer(ZONE, BalanceMode.FAILOVER)),
        ("trafficDistribution: PreferSameZone", LoadBalancer(ZONE, BalanceMode.FAILOVER)),
        (
            "trafficDistribution: PreferSameNode",
            LoadBalancer((*ZONE, Scope.SUBZONE, Scope.NODE), BalanceMode.FAILOVER),
        ),
        (
            "publishNotReadyAddresses: true",
            LoadBalancer((), BalanceMode.STANDARD, HealthPolicy.ALLOW_ALL),
        ),
    ],
)
def test_how_endpoints_are_chosen(text: str, wanted: LoadBalancer | None) -> None:
    assert read(text).load_balancer == wanted


@pytest.mark.parametrize(
    "text", ["ports: [{port: many}]", "clusterIP: here", "trafficDistribution: PreferMoon"]
)
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises((ResourceError, ValueError)):
        read(text)


def test_named_ports_are_looked_up_in_the_pod_and_left_out_if_it_has_none() -> None:
    spec = yaml.safe_load(
        "ports: [{port: 80, targetPort: http}, {port: 90, targetPort: grpc}, {port: 70}]"
    )
    pod = yaml.safe_load("containers: [{ports: [{name: http, containerPort: 8080}]}]")
    assert served_ports(spec, pod) == {80: 8080, 70: 70}


def test_a_service_without_a_selector_selects_nothing() -> None:
    assert selector_of({}) == {}
    assert selector_of({"selector": {"version": 1}}) == {"version": "1"}


USE = "istio.io/use-waypoint"
GATEWAY = a_gateway("shop/wp.shop.svc.lab.test")


def waypoints(serving: str, **namespace: str) -> Waypoints:
    labels = {"istio.io/waypoint-for": serving} if serving else {}
    return Waypoints({("shop", "wp"): labels}, "lab.test", {"shop": namespace, "bank": {}})


@pytest.mark.parametrize(
    ("serving", "for_service", "for_workload"),
    [
        ("", True, False),
        ("service", True, False),
        ("workload", False, True),
        ("all", True, True),
        ("none", False, False),
    ],
)
def test_what_a_waypoint_is_for(serving: str, for_service: bool, for_workload: bool) -> None:
    known = waypoints(serving)
    assert known.of_service("shop", {USE: "wp"}) == (GATEWAY if for_service else None)
    assert known.of_workload("shop", {USE: "wp"}) == (GATEWAY if for_workload else None)


def test_a_namespace_speaks_for_all_in_it_unless_they_say_otherwise() -> None:
    known = waypoints("all", **{USE: "wp"})
    assert known.of_service("shop", {}) == GATEWAY
    assert known.of_service("shop", {USE: "none"}) is None
    assert known.of_service("bank", {}) is None
    elsewhere = {USE: "wp", "istio.io/use-waypoint-namespace": "shop"}
    assert known.of_service("bank", elsewhere) == GATEWAY


def test_a_waypoint_has_no_waypoint() -> None:
    known = waypoints("all", **{USE: "wp"})
    assert known.of_workload("shop", {GATEWAY_NAME_LABEL: "wp"}) is None


def test_a_waypoint_without_a_service_gets_one() -> None:
    assert waypoint_service("wp", "shop", "lab.test").key == "shop/wp.shop.svc.lab.test"
