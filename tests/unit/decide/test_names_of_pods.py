from __future__ import annotations

import pytest

from tests.support.builders import a_service, a_store, a_workload
from tests.support.names import DOMAIN, HEADLESS, a_headless_store, a_pod, a_view, addresses_of
from ztunnel.decide import names
from ztunnel.model.service import HealthPolicy, LoadBalancer, Visibility
from ztunnel.model.workload import Health


def test_a_headless_service_has_the_addresses_of_its_endpoints() -> None:
    assert addresses_of("web", a_headless_store()) == ["10.1.0.1", "10.1.0.2"]


def test_a_headless_service_without_endpoints_is_ours_all_the_same() -> None:
    assert addresses_of("web", a_store(a_service(HEADLESS, ns="ns1"))) == []


def test_of_an_endpoint_only_the_first_address_of_a_family_counts() -> None:
    pod = a_workload(
        "web-0",
        ns="ns1",
        ips=["10.1.0.1", "10.1.0.9", "2001:db8::1"],
        services={f"ns1/{HEADLESS}": {80: 80}},
    )
    store = a_store(a_service(HEADLESS, ns="ns1"), pod)
    assert addresses_of("web", store) == ["10.1.0.1"]
    assert addresses_of("web", store, 6) == ["2001:db8::1"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (HealthPolicy.ONLY_HEALTHY, ["10.1.0.1", "10.1.0.2"]),
        (HealthPolicy.ALLOW_ALL, ["10.1.0.1", "10.1.0.2", "10.1.0.3"]),
    ],
)
def test_unhealthy_endpoints_count_if_the_service_says_so(
    policy: HealthPolicy, expected: list[str]
) -> None:
    sick = a_pod("web-2", "10.1.0.3", of=HEADLESS, health=Health.UNHEALTHY)
    store = a_headless_store(sick, load_balancer=LoadBalancer(health_policy=policy))
    assert addresses_of("web", store) == expected
    pod = names.find(f"web-2.{HEADLESS}", a_view(), store.services)
    assert (pod is not None) == (len(expected) == 3)


def test_endpoints_of_other_networks_are_left_out() -> None:
    far = a_pod("web-2", "10.1.0.3", of=HEADLESS, network="far")
    store = a_headless_store(far)
    assert addresses_of("web", store) == ["10.1.0.1", "10.1.0.2"]
    assert addresses_of("web", store, view=a_view(network="far")) == ["10.1.0.3"]
    assert addresses_of(f"web-2.{HEADLESS}", store) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"web-0.{HEADLESS}", ["10.1.0.1"]),
        (f"web-1.{HEADLESS}", ["10.1.0.2"]),
        (f"10-1-0-2.{HEADLESS}", ["10.1.0.2"]),
        (f"web-9.{HEADLESS}", None),
        (f"x.web-0.{HEADLESS}", None),
        (f"web-0.web.ns2.svc.{DOMAIN}", None),
        (f"web-0.svc.{DOMAIN}", None),
        (f"_http._tcp.{HEADLESS}", None),
    ],
)
def test_pods_of_a_headless_service_have_names(name: str, expected: list[str] | None) -> None:
    assert addresses_of(name, a_headless_store()) == expected


def test_pods_of_a_service_with_an_address_have_none() -> None:
    store = a_headless_store(vips=["10.0.0.1"])
    assert addresses_of(f"web-0.{HEADLESS}", store) is None


def test_pods_of_a_service_that_is_not_visible_have_none() -> None:
    store = a_headless_store(visibility=Visibility.NAMESPACE)
    assert addresses_of(f"web-0.{HEADLESS}", store) == ["10.1.0.1"]
    assert addresses_of(f"web-0.{HEADLESS}", store, view=a_view("ns2")) is None


def test_ipv6_endpoints_are_named_with_dashes() -> None:
    pod = a_pod("v6.pod", "2001:db8::a", of=HEADLESS)
    round_one = a_pod("another.pod", "2001:db8::", of=HEADLESS)
    store = a_store(a_service(HEADLESS, ns="ns1"), pod, round_one)
    assert addresses_of(f"2001-db8--a.{HEADLESS}", store, 6) == ["2001:db8::a"]
    assert addresses_of(f"2001-db8--a.{HEADLESS}", store, 4) == []
    assert addresses_of(f"2001-db8--0.{HEADLESS}", store, 6) == ["2001:db8::"]
