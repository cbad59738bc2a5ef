from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload
from ztunnel.decide.admit import (
    Admission,
    Answer,
    Rejection,
    admit,
    admit_plaintext,
    guess_service,
)
from ztunnel.decide.classify import illegal_ports
from ztunnel.decide.route import UnknownAddress
from ztunnel.model.network import Endpoint, HostPort, Network, Port, parse_ip
from ztunnel.model.service import Service, Visibility, WeightedWaypoint
from ztunnel.model.workload import ApplicationTunnel, AppProtocol, GatewayAddress, Workload
from ztunnel.state.store import Store

ILLEGAL = illegal_ports(has_socks5=True)
SERVER_HOST = "server.default.svc.cluster.local"
WAYPOINT_HOST = "waypoint.default.svc.cluster.local"
PROXY_TUNNEL = ApplicationTunnel(AppProtocol.PROXY, Port(15088))
BY_POD = a_gateway("/10.0.0.3")
BY_VIP = a_gateway("/10.10.0.2")
BY_NAME = a_gateway(f"default/{WAYPOINT_HOST}")


def a_server(**more: Any) -> Workload:
    services = {f"default/{SERVER_HOST}": {80: 8080}}
    return a_workload("server", ns="default", ips=["10.0.0.2"], services=services, **more)


def a_waypoint(**more: Any) -> Workload:
    services = {f"default/{WAYPOINT_HOST}": {15008: 15008}}
    return a_workload("waypoint", ns="default", ips=["10.0.0.3"], services=services, **more)


def a_server_service(**more: Any) -> Service:
    vips = more.pop("vips", ["10.10.0.1"])
    return a_service(SERVER_HOST, ns="default", vips=vips, **more)


def a_mesh(
    *,
    pod: GatewayAddress | None = None,
    service: GatewayAddress | None = None,
    tunnel: ApplicationTunnel | None = None,
    **more: Any,
) -> Store:
    """Build the mesh of the acceptance vectors; `pod` and `service` are the server's waypoints."""
    return a_store(
        a_workload("client", ns="default", ips=["10.0.0.1"]),
        a_server(waypoint=pod),
        a_waypoint(application_tunnel=tunnel),
        a_server_service(waypoint=service, **more),
        a_service(WAYPOINT_HOST, ns="default", vips=["10.10.0.2"], port_map={15008: 15008}),
    )


def authority_of(text: str) -> Endpoint | HostPort:
    host, _, port = text.rpartition(":")
    try:
        return Endpoint.parse(text)
    except ValueError:
        return HostPort(host, Port(int(port)))


def ask(store: Store, local: str, authority: str, **more: Any) -> Answer:
    workload = store.workloads.by_address(Network(""), parse_ip(local))
    assert workload is not None
    return admit(
        Endpoint(parse_ip(local), Port(15008)),
        authority_of(authority),
        workload=workload,
        store=store,
        illegal=ILLEGAL,
        network=Network(""),
        **more,
    )


def admitted(store: Store, local: str, authority: str, **more: Any) -> Admission:
    answer = ask(store, local, authority, **more)
    assert isinstance(answer, Admission)
    return answer


@pytest.mark.parametrize(
    ("mesh", "local", "authority", "destination", "proxy_destination"),
    [
        pytest.param({}, "10.0.0.2", "10.0.0.2:8080", "10.0.0.2:8080", None, id="the pod itself"),
        pytest.param(
            {}, "10.0.0.2", f"{SERVER_HOST}:80", "10.0.0.2:8080", None, id="the pod by its service"
        ),
        pytest.param(
            {"pod": BY_POD}, "10.0.0.3", "10.0.0.2:8080", "10.0.0.3:8080", None, id="pod's waypoint"
        ),
        pytest.param(
            {"pod": BY_VIP},
            "10.0.0.3",
            "10.0.0.2:8080",
            "10.0.0.3:8080",
            None,
            id="pod's waypoint by VIP",
        ),
        pytest.param(
            {"pod": BY_VIP, "tunnel": PROXY_TUNNEL},
            "10.0.0.3",
            "10.0.0.2:8080",
            "10.0.0.3:15088",
            "10.0.0.2:8080",
            id="pod's waypoint with PROXY",
        ),
        pytest.param(
            {"service": BY_VIP},
            "10.0.0.3",
            "10.10.0.1:8080",
            "10.0.0.3:8080",
            None,
            id="service's waypoint",
        ),
        pytest.param(
            {"service": BY_NAME},
            "10.0.0.3",
            "10.10.0.1:8080",
            "10.0.0.3:8080",
            None,
            id="service's waypoint by name",
        ),
        pytest.param(
            {"service": BY_VIP, "tunnel": PROXY_TUNNEL},
            "10.0.0.3",
            "10.10.0.1:8080",
            "10.0.0.3:15088",
            "10.10.0.1:8080",
            id="service's waypoint with PROXY",
        ),
        pytest.param(
            {"weighted_waypoints": (WeightedWaypoint(BY_VIP, 1),)},
            "10.0.0.3",
            "10.10.0.1:80",
            "10.0.0.3:80",
            None,
            id="one of several waypoints",
        ),
    ],
)
def test_acceptance_vectors(
    mesh: dict[str, Any],
    local: str,
    authority: str,
    destination: str,
    proxy_destination: str | None,
) -> None:
    answer = admitted(a_mesh(**mesh), local, authority)
    assert str(answer.destination) == destination
    wanted = Endpoint.parse(proxy_destination) if proxy_destination else None
    assert answer.proxy_destination == wanted


@pytest.mark.parametrize(
    ("mesh", "local", "authority", "status", "message"),
    [
        ({}, "10.0.0.2", "10.0.0.1:80", 400, "ip mismatch: 10.0.0.2 != 10.0.0.1"),
        ({}, "10.0.0.3", "10.0.0.1:80", 400, "ip mismatch: 10.0.0.3 != 10.0.0.1"),
        (
            {"service": BY_VIP},
            "10.0.0.3",
            "10.0.0.2:80",
            400,
            "ip mismatch: 10.0.0.3 != 10.0.0.2",
        ),
        ({"pod": BY_VIP}, "10.0.0.3", "10.10.0.1:80", 400, "ip mismatch: 10.0.0.3 != 10.10.0.1"),
        (
            {"service": BY_VIP},
            "10.0.0.2",
            "10.10.0.1:80",
            400,
            "ip mismatch: 10.0.0.2 != 10.10.0.1",
        ),
        (
            {"weighted_waypoints": (WeightedWaypoint(BY_VIP, 0),)},
            "10.0.0.3",
            "10.10.0.1:80",
            400,
            "ip mismatch: 10.0.0.3 != 10.10.0.1",
        ),
        ({}, "10.0.0.2", "nobody:80", 503, "no service or workload for hostname: nobody"),
        (
            {},
            "10.0.0.2",
            f"{SERVER_HOST}:81",
            503,
            f"requested service {SERVER_HOST}:81 found, but cannot resolve port",
        ),
        ({}, "10.0.0.2", "10.0.0.2:15008", 503, "attempted recursive call to ourselves"),
        ({}, "10.0.0.2", "10.0.0.2:15001", 503, "attempted recursive call to ourselves"),
        (
            {"tunnel": PROXY_TUNNEL, "vips": []},
            "10.0.0.3",
            f"{SERVER_HOST}:80",
            503,
            f"requested service {SERVER_HOST} found, but has no IP addresses",
        ),
    ],
)
def test_rejections(
    mesh: dict[str, Any], local: str, authority: str, status: int, message: str
) -> None:
    assert ask(a_mesh(**mesh), local, authority) == Rejection(status=status, message=message)


def test_a_v4_authority_may_be_written_as_v6() -> None:
    mapped = Endpoint(IPv6Address("::ffff:10.0.0.2"), Port(8080))
    answer = admit(
        Endpoint.parse("10.0.0.2:15008"),
        mapped,
        workload=a_server(),
        store=a_mesh(),
        illegal=ILLEGAL,
        network=Network(""),
    )
    assert isinstance(answer, Admission)
    assert str(answer.destination) == "10.0.0.2:8080"


def test_the_self_call_test_comes_before_the_tunnel_s_port() -> None:
    store = a_mesh(tunnel=ApplicationTunnel(AppProtocol.NONE, Port(15008)))
    assert admitted(store, "10.0.0.3", "10.0.0.2:80").destination.port == 15008
    assert isinstance(ask(store, "10.0.0.3", "10.0.0.2:15006"), Rejection)


def test_a_port_the_service_maps_onto_ours_is_illegal_too() -> None:
    service = a_service("evil.example.com", ns="default", port_map={80: 15006})
    answer = ask(a_store(a_server(), service), "10.0.0.2", "evil.example.com:80")
    assert answer == Rejection(status=503, message="attempted recursive call to ourselves")


def test_an_application_tunnel_with_proxy_is_dialed_on_loopback() -> None:
    store = a_mesh(tunnel=PROXY_TUNNEL)
    answer = admitted(store, "10.0.0.3", "10.0.0.2:8080")
    assert str(answer.dial) == "127.0.0.1:15088"
    answer = admitted(store, "10.0.0.3", "10.0.0.2:8080", tunnels_to_loopback=False)
    assert str(answer.dial) == "10.0.0.3:15088"


def test_loopback_follows_the_family_of_the_pod() -> None:
    pod = a_workload("waypoint", ips=["2001:db8::3"], application_tunnel=PROXY_TUNNEL)
    answer = admitted(a_store(pod), "2001:db8::3", "[2001:db8::9]:80")
    assert str(answer.dial) == "[::1]:15088"
    assert str(answer.destination) == "[2001:db8::3]:15088"


def test_a_plain_application_tunnel_only_moves_the_port() -> None:
    store = a_mesh(tunnel=ApplicationTunnel(AppProtocol.NONE, Port(9000)))
    answer = admitted(store, "10.0.0.3", "10.0.0.2:8080")
    assert str(answer.dial) == "10.0.0.3:9000"
    assert answer.proxy_destination is None


def test_an_application_tunnel_may_keep_the_port() -> None:
    store = a_mesh(tunnel=ApplicationTunnel(AppProtocol.PROXY, None))
    assert str(admitted(store, "10.0.0.3", "10.0.0.2:8080").dial) == "127.0.0.1:8080"


@pytest.mark.parametrize(
    ("vips", "expected"),
    [
        (["other/198.51.100.1", "/2001:db8::1", "/198.51.100.2"], "198.51.100.2:80"),
        (["other/198.51.100.1", "/2001:db8::1"], "[2001:db8::1]:80"),
        (["other/2001:db8::9", "other/198.51.100.1"], "198.51.100.1:80"),
    ],
)
def test_a_host_name_is_announced_as_a_vip(vips: list[str], expected: str) -> None:
    store = a_mesh(tunnel=PROXY_TUNNEL, vips=vips)
    answer = admitted(store, "10.0.0.3", f"{SERVER_HOST}:80")
    assert answer.proxy_destination == Endpoint.parse(expected)


def test_a_waypoint_serves_a_namespace_it_cannot_see_into() -> None:
    hidden = a_service(
        "hidden.shop", vips=["10.10.0.9"], waypoint=BY_POD, visibility=Visibility.NAMESPACE
    )
    sharer = a_service("public.bank", ns="bank", vips=["10.10.0.9"], canonical=True)
    store = a_store(a_waypoint(), sharer, hidden)
    assert isinstance(ask(store, "10.0.0.3", "10.10.0.9:80"), Admission)


def test_a_waypoint_known_by_its_own_host_name() -> None:
    pod = a_workload("wp", ns="default", ips=["10.0.0.3"], hostname="wp.example.com")
    server = a_server(waypoint=a_gateway("default/wp.example.com"))
    assert isinstance(ask(a_store(pod, server), "10.0.0.3", "10.0.0.2:80"), Admission)


def test_the_endpoint_s_own_port_mapping_comes_first() -> None:
    server = a_workload(
        "server", ns="default", ips=["10.0.0.2"], services={f"default/{SERVER_HOST}": {80: 9999}}
    )
    answer = admitted(a_store(server, a_server_service()), "10.0.0.2", f"{SERVER_HOST}:80")
    assert answer.destination.port == 9999


def test_a_host_name_prefers_the_pod_s_own_namespace() -> None:
    theirs = a_service("db.example.com", ns="bank", port_map={80: 1}, canonical=True)
    ours = a_service("db.example.com", ns="default", port_map={80: 2})
    answer = admitted(a_store(a_server(), theirs, ours), "10.0.0.2", "db.example.com:80")
    assert answer.destination.port == 2
    assert answer.service == ours


def test_on_demand_asks_for_an_unknown_authority_once() -> None:
    store = a_mesh()
    answer = ask(store, "10.0.0.3", "10.9.9.9:80", on_demand=True)
    assert answer == UnknownAddress("/10.9.9.9")
    answer = ask(store, "10.0.0.3", "10.9.9.9:80", on_demand=True, fetched=["/10.9.9.9"])
    assert isinstance(answer, Rejection)
    assert isinstance(ask(store, "10.0.0.3", "10.0.0.1:80", on_demand=True), Rejection)


def ask_plaintext(
    original: str, *, source: str = "10.0.0.9:4711", store: Store | None = None
) -> Admission | Rejection:
    return admit_plaintext(
        Endpoint.parse(original),
        source=Endpoint.parse(source),
        workload=a_server(),
        store=store or a_mesh(),
        illegal=ILLEGAL,
    )


def test_plaintext_goes_where_it_was_going() -> None:
    store = a_mesh()
    original = Endpoint.parse("10.0.0.2:8080")
    answer = ask_plaintext(str(original), store=store)
    assert isinstance(answer, Admission)
    assert (answer.destination, answer.dial) == (original, original)
    assert answer.service is not None
    assert answer.service.hostname == SERVER_HOST


def test_plaintext_to_one_of_our_ports_is_refused() -> None:
    assert isinstance(ask_plaintext("10.0.0.2:15008"), Rejection)


@pytest.mark.parametrize(
    ("source", "original", "kind"),
    [
        ("10.0.0.9:4711", "127.0.0.1:6379", Rejection),
        ("10.0.0.9:4711", "127.0.0.2:6379", Rejection),
        ("[2001:db8::9]:4711", "[::1]:6379", Rejection),
        ("127.0.0.1:4711", "127.0.0.2:6379", Admission),
    ],
)
def test_nobody_reaches_the_pods_loopback_from_outside(
    source: str, original: str, kind: type
) -> None:
    assert isinstance(ask_plaintext(original, source=source), kind)


A = a_service("a.example.com", port_map={80: 8080})
B = a_service("b.example.com", port_map={90: 0})


@pytest.mark.parametrize(
    ("port", "host", "expected"),
    [
        (8080, None, A),
        (9090, None, B),
        (8080, "b.example.com", B),
        (8080, "elsewhere.example.com", A),
        (1, None, None),
        (1, "a.example.com", A),
    ],
)
def test_the_service_is_guessed_by_host_then_by_port(
    port: int, host: str | None, expected: Service | None
) -> None:
    workload = a_workload(services={"shop/a.example.com": {}, "shop/b.example.com": {90: 9090}})
    assert guess_service([A, B], workload, Port(port), host) == expected
