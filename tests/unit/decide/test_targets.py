from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_service, a_store, a_workload
from tests.support.names import HEADLESS, a_headless_store, a_kube_service, a_pod, a_view, kube
from ztunnel.decide import names
from ztunnel.decide.targets import TARGETS_MAX, numbered, targets
from ztunnel.model.network import Port
from ztunnel.model.service import IpFamilies
from ztunnel.state.store import Store
from ztunnel.wire import dns_records
from ztunnel.wire.dns import MESSAGE_BYTES_MAX
from ztunnel.wire.dns_records import encode_name

Listed = list[tuple[str, int, list[str]]] | None
WEB = [(f"web-0.{HEADLESS}", 8080, ["10.1.0.1"]), (f"web-1.{HEADLESS}", 8080, ["10.1.0.2"])]


def targets_of(name: str, store: Store, port: int | None = None, **view: Any) -> Listed:
    seen = a_view(**view)
    found = names.find(name, seen, store.services)
    assert found is not None
    listed = targets(found, seen, store.services, None if port is None else Port(port))
    if listed is None:
        return None
    return [(one.host, one.port, [str(ip) for ip in one.addresses]) for one in listed]


@pytest.mark.parametrize("name", ["web", "web.ns1", HEADLESS])
def test_a_headless_service_is_where_its_pods_are(name: str) -> None:
    assert targets_of(name, a_headless_store()) == WEB


def test_pods_are_called_as_their_names_can_be_asked_for() -> None:
    dotted = a_pod("node.pod", "10.1.0.3", of=HEADLESS)
    lengthy = a_pod("x" * 64, "10.1.0.5", of=HEADLESS)
    far = a_pod("far", "10.1.0.4", of=HEADLESS, network="far")
    nameless = a_workload("", ns="ns1", ips=[], services={f"ns1/{HEADLESS}": {80: 1}}, uid="x")
    store = a_headless_store(dotted, lengthy, far, nameless)
    by_address = [(f"10-1-0-{n}.{HEADLESS}", 8080, [f"10.1.0.{n}"]) for n in (3, 5)]
    assert targets_of("web", store) == [*WEB, *by_address]
    for host, _, addresses in targets_of("web", store) or []:
        found = names.find(host, a_view(), store.services)
        assert found is not None
        assert list(map(str, names.addresses(found, 4, a_view(), store.services))) == addresses


def test_a_pod_of_a_headless_service_is_at_its_own_ports() -> None:
    assert targets_of(f"web-1.{HEADLESS}", a_headless_store()) == WEB[1:]


@pytest.mark.parametrize(
    ("endpoint_port", "service_port", "expected"),
    [(8080, 9090, 8080), (0, 9090, 9090), (0, 0, 80)],
)
def test_a_target_port_is_the_endpoints_else_the_services(
    endpoint_port: int, service_port: int, expected: int
) -> None:
    store = a_store(
        a_service(HEADLESS, ns="ns1", port_map={80: service_port}),
        a_workload(
            "web-0", ns="ns1", ips=["10.1.0.1"], services={f"ns1/{HEADLESS}": {80: endpoint_port}}
        ),
    )
    assert targets_of("web", store) == [(f"web-0.{HEADLESS}", expected, ["10.1.0.1"])]


MANY = {80: 8080, 443: 8443}
MANY_STORE = a_store(
    a_service(HEADLESS, ns="ns1", port_map=MANY),
    a_workload("web-0", ns="ns1", ips=["10.1.0.1"], services={f"ns1/{HEADLESS}": MANY}),
    a_kube_service("cart", "ns1", "10.0.0.1", "2001:db8::1", "far/10.0.0.9", port_map=MANY),
    a_service("api.example.com", ns="ns1", vips=["10.0.0.3"]),
    a_service("*.wide.svc.cluster.local", ns="ns1", vips=["10.0.0.4"]),
)


@pytest.mark.parametrize(("port", "expected"), [(None, [8080, 8443]), (443, [8443]), (8443, [])])
def test_one_port_of_the_service_is_one_of_the_pods(port: int | None, expected: list[int]) -> None:
    listed = targets_of("web", MANY_STORE, port)
    assert [number for _, number, _ in listed or []] == expected


@pytest.mark.parametrize(("port", "expected"), [(None, [80, 443]), (443, [443]), (8443, [])])
def test_a_service_with_an_address_is_there_at_its_own_ports(
    port: int | None, expected: list[int]
) -> None:
    addresses = ["10.0.0.1", "2001:db8::1"]
    assert targets_of("cart", MANY_STORE, port) == [
        (kube("cart"), number, addresses) for number in expected
    ]
    assert targets_of("cart", MANY_STORE, 80, ipv6=False) == [(kube("cart"), 80, addresses[:1])]


def test_addresses_are_of_the_families_that_the_service_has() -> None:
    pod = a_workload(
        "web-0", ns="ns1", ips=["10.1.0.1", "fd00::1"], services={f"ns1/{HEADLESS}": {80: 80}}
    )
    for families, expected in [
        (IpFamilies.DUAL, ["10.1.0.1", "fd00::1"]),
        (IpFamilies.IPV6_ONLY, ["fd00::1"]),
    ]:
        store = a_store(a_service(HEADLESS, ns="ns1", ip_families=families), pod)
        assert targets_of("web", store) == [(f"web-0.{HEADLESS}", 80, expected)]


def test_no_more_are_listed_than_a_message_can_hold() -> None:
    ports = {80: 80, 81: 81}
    pods = [
        a_workload(f"p{n}", ns="ns1", ips=["10.1.0.1"], services={f"ns1/{HEADLESS}": ports})
        for n in range(TARGETS_MAX)
    ]
    store = a_store(a_service(HEADLESS, ns="ns1", port_map=ports), *pods)
    assert len(targets_of("web", store) or []) == TARGETS_MAX
    shortest = dns_records.service_record(b"\xc0\x0c", encode_name("a.b.c.svc.d"), 1, 1, 1)
    assert len(shortest) * TARGETS_MAX > MESSAGE_BYTES_MAX


@pytest.mark.parametrize("name", ["api.example.com", "x.wide.svc.cluster.local"])
def test_what_other_names_stand_for_is_not_ours_to_say(name: str) -> None:
    assert targets_of(name, MANY_STORE) is None


@given(port=st.integers(1, 65535), rest=st.text(alphabet="ab.-", min_size=1))
def test_a_port_is_read_as_it_is_written(port: int, rest: str) -> None:
    assert numbered(f"_{port}._tcp.{rest}") == (port, rest)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "web",
        "_80._tcp",
        "_80._udp.web",
        "_http._tcp.web",
        "80._tcp.web",
        "_80.tcp.web",
        "_._tcp.web",
        "_0._tcp.web",
        "_080._tcp.web",
        "_65536._tcp.web",
        "_99999999999999999999._tcp.web",
        "_\u0668\u0660._tcp.web",
        "_8\u00b2._tcp.web",
        "_-1._tcp.web",
        "_8_0._tcp.web",
        "__80._tcp.web",
    ],
)
def test_other_names_have_no_port(name: str) -> None:
    assert numbered(name) is None
