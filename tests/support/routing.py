"""A small mesh to route in: the acceptance vectors of dataplane.md 15.1 and their kin."""

from __future__ import annotations

import random
from typing import Any

from tests.support.builders import a_gateway, a_service, a_workload
from ztunnel.decide.route import Hop, OutboundRequest, Route, route
from ztunnel.model.network import Endpoint, Network, parse_ip
from ztunnel.model.service import (
    BalanceMode,
    LoadBalancer,
    Scope,
    Service,
)
from ztunnel.model.workload import Health, TunnelProtocol, Workload
from ztunnel.state.store import Store

HBONE = TunnelProtocol.HBONE
SOURCE = a_workload("client", ns="ns", ips=["127.0.0.1"])
KEY = "ns/example.com"
REMOTE_GATEWAY = a_gateway("remote/10.22.1.1", 15009)
GATEWAY_POD = a_workload("gateway", ns="east", sa="gateway", ips=["10.22.1.1"], network="remote")


def ask(
    store: Store, target: str, *, source: Workload = SOURCE, seed: int = 0, **more: Any
) -> Route:
    request = OutboundRequest(
        source=source, source_ip=parse_ip("127.0.0.1"), target=Endpoint.parse(target)
    )
    return route(request, store, network=Network(""), rng=random.Random(seed), **more)


def hop(store: Store, target: str, **more: Any) -> Hop:
    answer = ask(store, target, **more)
    assert isinstance(answer, Hop)
    return answer


def summary(answer: Hop) -> str:
    """Write a hop as the acceptance vectors do."""
    return f"{answer.protocol} / {answer.authority or '-'} / {answer.peer}"


def a_pod(name: str = "server", ip: str = "127.0.0.2", **more: Any) -> Workload:
    return a_workload(name, ns="ns", sa=name, ips=[ip], **more)


def a_vip_service(**more: Any) -> Service:
    return a_service("example.com", ns="ns", vips=["127.0.0.3"], **more)


def a_remote_pod(**more: Any) -> Workload:
    return a_workload(
        "remote",
        ns="ns",
        ips=[],
        network="remote",
        services={KEY: {80: 8080}},
        protocol=HBONE,
        **more,
    )


def a_waypoint(ip: str = "127.0.0.10", **more: Any) -> Workload:
    return a_workload("waypoint", ns="ns", sa="waypoint", ips=[ip], protocol=HBONE, **more)


BEHIND_GATEWAY = a_remote_pod(network_gateway=REMOTE_GATEWAY)
NETWORK_FIRST = LoadBalancer((Scope.NETWORK,), BalanceMode.FAILOVER)
LOCAL_POD = a_pod(protocol=HBONE, services={KEY: {80: 8080}})
SICK_POD = a_pod(protocol=HBONE, services={KEY: {80: 8080}}, health=Health.UNHEALTHY)
TO_GATEWAY = "DOUBLEHBONE / example.com:80 / 10.22.1.1:15009"
VIA_WAYPOINT = a_gateway("/127.0.0.10")
GATEWAY_SERVICE = a_service("gw.example.com", ns="east", port_map={15009: 15008})
GATEWAY_ENDPOINT = a_workload(
    "gw", ns="east", ips=["127.0.0.5"], services={"east/gw.example.com": {15009: 15008}}
)
REMOTE_WAYPOINT = a_workload(
    "remote-waypoint",
    ns="ns",
    ips=[],
    network="remote",
    network_gateway=REMOTE_GATEWAY,
    services={"ns/waypoint.example.com": {15008: 15008}},
)
WAYPOINT_SERVICE = a_service("waypoint.example.com", ns="ns", port_map={15008: 15008})
