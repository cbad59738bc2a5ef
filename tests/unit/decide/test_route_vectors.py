from __future__ import annotations

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload
from tests.support.routing import (
    BEHIND_GATEWAY,
    GATEWAY_ENDPOINT,
    GATEWAY_POD,
    GATEWAY_SERVICE,
    HBONE,
    KEY,
    LOCAL_POD,
    NETWORK_FIRST,
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
from ztunnel.errors import RouteError
from ztunnel.model.service import (
    BalanceMode,
    IpFamilies,
    LoadBalancer,
    Service,
)
from ztunnel.model.workload import NetworkMode, Workload


@pytest.mark.parametrize(
    ("things", "target", "expected"),
    [
        pytest.param([], "1.2.3.4:80", "TCP / - / 1.2.3.4:80", id="nothing is known"),
        pytest.param(
            [a_vip_service(), BEHIND_GATEWAY, GATEWAY_POD],
            "127.0.0.3:80",
            TO_GATEWAY,
            id="a remote endpoint behind a gateway given by address",
        ),
        pytest.param(
            [
                a_vip_service(),
                a_remote_pod(network_gateway=a_gateway("east/gw.example.com", 15009)),
                GATEWAY_SERVICE,
                GATEWAY_ENDPOINT,
            ],
            "127.0.0.3:80",
            "DOUBLEHBONE / example.com:80 / 127.0.0.5:15008",
            id="a remote endpoint behind a gateway given by name",
        ),
        pytest.param(
            [
                a_vip_service(waypoint=a_gateway("ns/waypoint.example.com")),
                WAYPOINT_SERVICE,
                REMOTE_WAYPOINT,
                GATEWAY_POD,
            ],
            "127.0.0.3:80",
            TO_GATEWAY,
            id="the service's waypoint is in another network",
        ),
        pytest.param(
            [a_vip_service(load_balancer=NETWORK_FIRST), LOCAL_POD, BEHIND_GATEWAY, GATEWAY_POD],
            "127.0.0.3:80",
            "HBONE / 127.0.0.2:8080 / 127.0.0.2:15008",
            id="the local pod is preferred",
        ),
        pytest.param(
            [a_vip_service(load_balancer=NETWORK_FIRST), SICK_POD, BEHIND_GATEWAY, GATEWAY_POD],
            "127.0.0.3:80",
            TO_GATEWAY,
            id="the local pod is unhealthy",
        ),
        pytest.param([a_pod()], "127.0.0.2:80", "TCP / - / 127.0.0.2:80", id="a pod without HBONE"),
        pytest.param(
            [a_pod(protocol=HBONE)],
            "127.0.0.2:80",
            "HBONE / 127.0.0.2:80 / 127.0.0.2:15008",
            id="a pod with HBONE",
        ),
        pytest.param(
            [a_pod(protocol=HBONE, waypoint=VIA_WAYPOINT), a_waypoint()],
            "127.0.0.2:80",
            "HBONE / 127.0.0.2:80 / 127.0.0.10:15008",
            id="the pod has a waypoint",
        ),
        pytest.param(
            [
                a_workload(
                    "dual",
                    ns="ns",
                    ips=["127.0.0.4", "ff06::c3"],
                    protocol=HBONE,
                    waypoint=a_gateway("/127.0.0.11"),
                ),
                a_workload("wp", ns="ns", ips=["127.0.0.11", "ff06::c5"], protocol=HBONE),
            ],
            "[ff06::c3]:80",
            "HBONE / [ff06::c3]:80 / 127.0.0.11:15008",
            id="a waypoint given by its v4 address serves a v6 client",
        ),
        pytest.param(
            [a_vip_service(waypoint=VIA_WAYPOINT), LOCAL_POD, a_waypoint()],
            "127.0.0.3:80",
            "HBONE / 127.0.0.3:80 / 127.0.0.10:15008",
            id="the service has a waypoint",
        ),
        pytest.param(
            [
                a_vip_service(port_map={80: 0}),
                a_pod("other", "127.0.0.6", services={KEY: {8080: 9090}}),
                a_pod(services={KEY: {80: 1234}}),
            ],
            "127.0.0.3:80",
            "TCP / - / 127.0.0.2:1234",
            id="a named port",
        ),
        pytest.param(
            [
                a_vip_service(),
                a_pod("a", network_mode=NetworkMode.HOST_NETWORK),
                a_pod("b", network_mode=NetworkMode.HOST_NETWORK, services={KEY: {80: 8080}}),
            ],
            "127.0.0.3:80",
            "TCP / - / 127.0.0.2:8080",
            id="a host-network pod through its service",
        ),
        pytest.param(
            [a_service("open.example.com", ns="ns", vips=["1.2.3.4"], load_balancer=LoadBalancer(
                mode=BalanceMode.PASSTHROUGH))],
            "1.2.3.4:80",
            "TCP / - / 1.2.3.4:80",
            id="a PASSTHROUGH service",
        ),
        pytest.param(
            [
                a_service(
                    "open.example.com",
                    ns="ns",
                    vips=["1.2.3.4"],
                    load_balancer=LoadBalancer(mode=BalanceMode.PASSTHROUGH),
                    waypoint=VIA_WAYPOINT,
                ),
                a_waypoint(),
            ],
            "1.2.3.4:80",
            "HBONE / 1.2.3.4:80 / 127.0.0.10:15008",
            id="a PASSTHROUGH service with a waypoint",
        ),
    ],
)  # fmt: skip
def test_acceptance_vectors(things: list[Workload | Service], target: str, expected: str) -> None:
    assert summary(hop(a_store(SOURCE, *things), target)) == expected


@pytest.mark.parametrize(
    ("things", "target", "message"),
    [
        pytest.param(
            [a_vip_service(), a_remote_pod()],
            "127.0.0.3:80",
            "no healthy upstream: 127.0.0.3:80",
            id="a remote endpoint without address or gateway is none",
        ),
        pytest.param(
            [
                a_vip_service(),
                a_workload("far", ips=["10.9.9.9"], network="remote", services={KEY: {80: 80}}),
            ],
            "127.0.0.3:80",
            "no valid routing destination for workload: lab//Pod/shop/far",
            id="a remote endpoint with an address but no gateway",
        ),
        pytest.param(
            [a_vip_service(), BEHIND_GATEWAY],
            "127.0.0.3:80",
            "unknown network gateway: network gateway remote/10.22.1.1 not found",
            id="an unknown gateway",
        ),
        pytest.param(
            [a_vip_service()],
            "127.0.0.3:80",
            "no healthy upstream: 127.0.0.3:80",
            id="no endpoints",
        ),
        pytest.param(
            [a_vip_service(), LOCAL_POD],
            "127.0.0.3:81",
            "no healthy upstream: 127.0.0.3:81",
            id="an undeclared port",
        ),
        pytest.param(
            [a_vip_service(), SICK_POD],
            "127.0.0.3:80",
            "no healthy upstream: 127.0.0.3:80",
            id="only an unhealthy endpoint",
        ),
        pytest.param(
            [a_vip_service(waypoint=VIA_WAYPOINT), LOCAL_POD],
            "127.0.0.3:80",
            "unknown waypoint: waypoint /127.0.0.10 not found",
            id="an unknown waypoint by address",
        ),
        pytest.param(
            [a_pod(waypoint=a_gateway("ns/wp.example.com"))],
            "127.0.0.2:80",
            "unknown waypoint: waypoint wp.example.com not found",
            id="an unknown waypoint by name",
        ),
        pytest.param(
            [
                a_vip_service(ip_families=IpFamilies.IPV6_ONLY),
                a_pod(services={KEY: {80: 8080}}, protocol=HBONE),
            ],
            "127.0.0.3:80",
            "no valid routing destination for workload: lab//Pod/ns/server",
            id="no address of the service's family",
        ),
    ],
)
def test_refused(things: list[Workload | Service], target: str, message: str) -> None:
    with pytest.raises(RouteError) as caught:
        ask(a_store(SOURCE, *things), target)
    assert str(caught.value) == message
