from __future__ import annotations

import random

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload, an_identity
from tests.support.routing import (
    BEHIND_GATEWAY,
    GATEWAY_POD,
    HBONE,
    KEY,
    LOCAL_POD,
    REMOTE_GATEWAY,
    REMOTE_WAYPOINT,
    SICK_POD,
    SOURCE,
    TO_GATEWAY,
    VIA_WAYPOINT,
    WAYPOINT_SERVICE,
    a_pod,
    a_remote_pod,
    a_vip_service,
    a_waypoint,
    ask,
    hop,
    summary,
)
from ztunnel.decide.route import Hop, ResolveHostname, UnknownAddress
from ztunnel.errors import RouteError
from ztunnel.model.network import parse_ip
from ztunnel.model.service import (
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Visibility,
    WeightedWaypoint,
)
from ztunnel.model.workload import NetworkMode
from ztunnel.state.store import Store


@pytest.mark.parametrize(
    ("families", "target", "expected"),
    [
        (IpFamilies.IPV6_ONLY, "127.0.0.3:80", "[2001:db8::2]:15008"),
        (IpFamilies.IPV6_ONLY, "[2001:db8::3]:80", "[2001:db8::2]:15008"),
        (IpFamilies.IPV4_ONLY, "127.0.0.3:80", "127.0.0.2:15008"),
        (IpFamilies.IPV4_ONLY, "[2001:db8::3]:80", "127.0.0.2:15008"),
        (IpFamilies.DUAL, "127.0.0.3:80", "127.0.0.2:15008"),
        (IpFamilies.DUAL, "[2001:db8::3]:80", "[2001:db8::2]:15008"),
        (None, "[2001:db8::3]:80", "[2001:db8::2]:15008"),
    ],
)
def test_the_service_says_which_family_its_pods_are_reached_by(
    families: IpFamilies | None, target: str, expected: str
) -> None:
    service = a_service(
        "example.com", ns="ns", vips=["127.0.0.3", "2001:db8::3"], ip_families=families
    )
    pod = a_workload(ips=["127.0.0.2", "2001:db8::2"], protocol=HBONE, services={KEY: {80: 8080}})
    assert str(hop(a_store(service, pod), target).peer) == expected


def test_the_source_s_own_waypoint_is_not_used() -> None:
    source = a_workload("client", ns="ns", ips=["127.0.0.1"], waypoint=VIA_WAYPOINT)
    store = a_store(source, a_pod(), a_waypoint())
    assert summary(hop(store, "127.0.0.2:80", source=source)) == "TCP / - / 127.0.0.2:80"


def test_a_host_network_pod_called_by_its_node_address_is_nobody() -> None:
    store = a_store(a_pod(network_mode=NetworkMode.HOST_NETWORK))
    answer = hop(store, "127.0.0.2:80")
    assert answer.passthrough
    assert answer.workload is None
    assert answer.expected == ()


def test_direct_hbone_expects_the_workload_and_whom_the_service_vouches_for() -> None:
    service = a_vip_service(
        subject_alt_names=("spiffe://td/ns/a/sa/b", "no identity", "spiffe://td/ns/a")
    )
    answer = hop(a_store(service, LOCAL_POD), "127.0.0.3:80")
    assert answer.expected == (an_identity("b", "a", "td"), an_identity("server", "ns"))
    assert answer.ignored_names == ("no identity", "spiffe://td/ns/a")
    assert answer.workload == LOCAL_POD
    assert answer.service == service


def test_a_waypoint_is_expected_not_the_pod_behind_it() -> None:
    store = a_store(a_vip_service(waypoint=VIA_WAYPOINT), LOCAL_POD, a_waypoint())
    answer = hop(store, "127.0.0.3:80")
    assert answer.expected == (an_identity("waypoint", "ns"),)
    assert answer.workload == a_waypoint()
    assert answer.service is not None


def test_a_waypoint_s_service_vouches_too() -> None:
    key = "ns/waypoint.example.com"
    store = a_store(
        a_vip_service(waypoint=a_gateway(key)),
        a_service(
            "waypoint.example.com",
            ns="ns",
            port_map={15008: 15008},
            subject_alt_names=("spiffe://td/ns/a/sa/b",),
        ),
        a_waypoint(services={key: {15008: 15008}}),
    )
    expected = (an_identity("b", "a", "td"), an_identity("waypoint", "ns"))
    assert hop(store, "127.0.0.3:80").expected == expected


def test_double_hbone_expects_the_gateway_outside_and_only_the_service_s_names_inside() -> None:
    service = a_vip_service(subject_alt_names=("spiffe://td/ns/a/sa/b",))
    answer = hop(a_store(service, BEHIND_GATEWAY, GATEWAY_POD), "127.0.0.3:80")
    assert answer.expected == (an_identity("gateway", "east"),)
    assert answer.inner_expected == (an_identity("b", "a", "td"),)
    assert answer.service == service


def test_an_undeclared_waypoint_port_needs_an_application_tunnel() -> None:
    service = a_vip_service(waypoint=a_gateway("ns/waypoint.example.com"))
    waypoint_service = a_service("waypoint.example.com", ns="ns", port_map={})
    pod = a_waypoint(services={"ns/waypoint.example.com": {}})
    with pytest.raises(RouteError, match="unknown waypoint"):
        ask(a_store(service, waypoint_service, pod), "127.0.0.3:80")


def test_the_waypoint_of_a_workload_goes_straight_to_it() -> None:
    source = a_workload("waypoint", ns="ns", sa="waypoint", ips=["127.0.0.1"])
    pod = a_pod(protocol=HBONE, waypoint=a_gateway("/127.0.0.1"))
    assert str(hop(a_store(source, pod), "127.0.0.2:80", source=source).peer) == "127.0.0.2:15008"


def test_the_waypoint_of_a_service_goes_straight_to_its_endpoints() -> None:
    key = "ns/waypoint.example.com"
    source = a_workload(
        "waypoint", ns="ns", sa="waypoint", ips=["127.0.0.1"], services={key: {15008: 15008}}
    )
    service = a_vip_service(waypoint=a_gateway(key))
    store = a_store(source, service, LOCAL_POD, WAYPOINT_SERVICE)
    assert str(hop(store, "127.0.0.3:80", source=source).peer) == "127.0.0.2:15008"


def test_somebody_at_another_address_is_not_the_waypoint() -> None:
    source = a_workload("waypoint", ns="ns", sa="waypoint", ips=["127.0.0.9"])
    pod = a_pod(protocol=HBONE, waypoint=a_gateway("/127.0.0.9"))
    assert str(hop(a_store(source, pod), "127.0.0.2:80", source=source).peer) == "127.0.0.9:15008"


def test_several_waypoints_share_the_connections_by_weight() -> None:
    choices = tuple(
        WeightedWaypoint(a_gateway(f"/127.0.0.{last}"), weight)
        for last, weight in [(20, 1), (21, 0), (22, 3)]
    )
    store = a_store(
        a_vip_service(weighted_waypoints=choices),
        *(a_waypoint(f"127.0.0.{last}", uid=f"wp{last}") for last in (20, 21, 22)),
    )
    peers = [str(hop(store, "127.0.0.3:80", seed=seed).peer.ip) for seed in range(200)]
    assert set(peers) == {"127.0.0.20", "127.0.0.22"}
    assert peers.count("127.0.0.22") > peers.count("127.0.0.20")


def test_without_positive_weights_the_single_waypoint_counts() -> None:
    store = a_store(
        a_vip_service(
            weighted_waypoints=(WeightedWaypoint(a_gateway("/127.0.0.20"), 0),),
            waypoint=VIA_WAYPOINT,
        ),
        a_waypoint(),
    )
    assert str(hop(store, "127.0.0.3:80").peer) == "127.0.0.10:15008"


def test_a_remote_workload_called_by_address_has_no_service_to_ask_for() -> None:
    far = a_workload("far", ips=["10.9.9.9"], network="remote", waypoint=VIA_WAYPOINT)
    source = a_workload("client", ns="ns", ips=["127.0.0.1"], network="remote")
    # Looked up in the source's network first of all: there it is an ordinary neighbour.
    assert str(hop(a_store(far, a_waypoint()), "10.9.9.9:80", source=source).peer).endswith("15008")
    near = a_workload("client", ns="ns", ips=["127.0.0.1"])
    assert hop(a_store(far), "10.9.9.9:80", source=near).passthrough


def test_a_workload_that_is_also_a_vip_keeps_both_waypoint_rules() -> None:
    vm = a_pod(waypoint=VIA_WAYPOINT, services={KEY: {80: 8080}})
    service = a_service("example.com", ns="ns", vips=["127.0.0.2"])
    assert str(hop(a_store(vm, service, a_waypoint()), "127.0.0.2:80").peer) == "127.0.0.10:15008"
    through = a_service(
        "example.com", ns="ns", vips=["127.0.0.2"], waypoint=a_gateway("/127.0.0.11")
    )
    store = a_store(vm, through, a_waypoint("127.0.0.11"))
    assert str(hop(store, "127.0.0.2:80").peer) == "127.0.0.11:15008"


def test_a_workload_in_another_network_is_not_reached_through_its_waypoint() -> None:
    far = a_remote_pod(network_gateway=REMOTE_GATEWAY, waypoint=VIA_WAYPOINT)
    both = a_service("example.com", ns="ns", vips=["127.0.0.2"])
    store = a_store(a_pod(), both, far, a_waypoint(), GATEWAY_POD)
    assert summary(hop(store, "127.0.0.2:80")) == TO_GATEWAY


def test_a_workload_that_is_also_a_vip_takes_undeclared_ports_itself() -> None:
    vm = a_pod(services={KEY: {80: 8080}})
    service = a_service("example.com", ns="ns", vips=["127.0.0.2"])
    assert summary(hop(a_store(vm, service), "127.0.0.2:22")) == "TCP / - / 127.0.0.2:22"


def test_an_invisible_service_is_nobody() -> None:
    hidden = a_service(ns="other", vips=["127.0.0.3"], visibility=Visibility.NAMESPACE)
    assert hop(a_store(hidden), "127.0.0.3:80").passthrough


def test_a_sick_endpoint_serves_where_all_are_allowed() -> None:
    service = a_vip_service(load_balancer=LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL))
    assert hop(a_store(service, SICK_POD), "127.0.0.3:80").workload == SICK_POD


def a_named_store() -> Store:
    pod = a_workload(
        "db", ns="ns", ips=[], hostname="db.example.org", services={KEY: {80: 5432}}, protocol=HBONE
    )
    return a_store(a_vip_service(), pod)


def test_a_workload_with_only_a_name_must_be_resolved() -> None:
    answer = ask(a_named_store(), "127.0.0.3:80")
    assert isinstance(answer, ResolveHostname)
    assert answer.hostname == "db.example.org"
    found = [parse_ip("2001:db8::9"), parse_ip("198.51.100.9")]
    for seed in range(10):
        resolved = answer.resolved(found, random.Random(seed))
        assert summary(resolved) == "HBONE / 198.51.100.9:5432 / 198.51.100.9:15008"
    assert str(answer.resolved(found[:1], random.Random(0)).peer) == "[2001:db8::9]:15008"


def test_a_name_without_addresses_is_an_error() -> None:
    answer = ask(a_named_store(), "127.0.0.3:80")
    assert isinstance(answer, ResolveHostname)
    with pytest.raises(RouteError) as caught:
        answer.resolved([], random.Random(0))
    assert str(caught.value) == (
        "ip addresses were resolved for workload lab//Pod/ns/db, "
        "but valid dns response had no A/AAAA records"
    )
    assert str(answer.failed()) == "no ip addresses were resolved for workload: lab//Pod/ns/db"


def test_without_a_service_there_is_no_way_into_another_network() -> None:
    vm = a_pod(network="")
    source = a_workload("client", ns="ns", ips=["127.0.0.1"], network="elsewhere")
    store = a_store(vm, a_service("example.com", ns="ns", vips=["127.0.0.2"]))
    with pytest.raises(RouteError) as caught:
        ask(store, "127.0.0.2:22", source=source)
    assert str(caught.value) == "no service for target address: 127.0.0.2:22"


def test_on_demand_asks_once_for_an_unknown_address() -> None:
    store = a_store(SOURCE)
    assert ask(store, "1.2.3.4:80", on_demand=True) == UnknownAddress("/1.2.3.4")
    answer = ask(store, "1.2.3.4:80", on_demand=True, fetched=["/1.2.3.4"])
    assert isinstance(answer, Hop)
    assert answer.passthrough


def test_on_demand_asks_for_an_unknown_waypoint_and_for_an_unknown_gateway() -> None:
    store = a_store(a_vip_service(waypoint=a_gateway("ns/wp.example.com")))
    assert ask(store, "127.0.0.3:80", on_demand=True) == UnknownAddress("ns/wp.example.com")
    store = a_store(a_vip_service(), BEHIND_GATEWAY)
    assert ask(store, "127.0.0.3:80", on_demand=True) == UnknownAddress("remote/10.22.1.1")


def test_a_waypoint_workload_in_another_network_needs_an_address() -> None:
    pod = a_pod(waypoint=a_gateway("ns/waypoint.example.com"))
    store = a_store(pod, WAYPOINT_SERVICE, REMOTE_WAYPOINT, GATEWAY_POD)
    with pytest.raises(RouteError, match="no valid routing destination for workload"):
        ask(store, "127.0.0.2:80")
