from __future__ import annotations

import pytest

from tests.support.builders import a_service, a_workload
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.service import HealthPolicy, LoadBalancer, Service, Visibility
from ztunnel.model.workload import Health, NamespacedHostname, ServiceKey, Workload
from ztunnel.state.services import Services

HERE = Network("")
CART = a_service(vips=["10.0.0.1", "far/10.0.0.2", "2001:db8::1"])
KEY = CART.key
ALLOW_ALL = LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL)


def stored(*services: Service) -> Services:
    found = Services()
    for service in services:
        found.put(service)
    return found


def at(services: Services, ip: str, client: str | None = None, network: str = "") -> Service | None:
    namespace = None if client is None else Namespace(client)
    return services.by_vip(Network(network), parse_ip(ip), namespace)


def an_endpoint(name: str, health: Health = Health.HEALTHY, key: str = KEY) -> Workload:
    return a_workload(name, uid=name, services={key: {80: 8080}}, health=health)


def test_a_service_is_found_by_key_name_and_vip() -> None:
    services = stored(CART)
    assert services.by_key(KEY) == CART
    assert services.by_name(NamespacedHostname(Namespace("shop"), CART.hostname)) == CART
    assert services.by_name(NamespacedHostname(Namespace("bank"), CART.hostname)) is None
    assert services.by_hostname(CART.hostname) == CART
    assert services.by_hostname("other") is None
    assert at(services, "10.0.0.1") == CART
    assert at(services, "2001:db8::1") == CART
    assert at(services, "10.0.0.2", network="far") == CART
    assert at(services, "10.0.0.2") is None
    assert at(services, "10.0.0.2", network="unheard-of") is None
    assert list(services.all()) == list(services.named(CART.hostname)) == [CART]
    assert len(services) == 1
    assert services.named("other") == ()


def test_a_removed_service_is_nowhere() -> None:
    service = a_service(vips=["10.0.0.1", "10.0.0.1"], cidrs=["10.1.0.0/16", "2001:db8::/32"])
    services = stored(service)
    assert services.remove(service.key) == service
    assert services.remove(service.key) is None
    assert at(services, "10.0.0.1") is at(services, "10.1.2.3") is None
    assert services.by_hostname(service.hostname) is None


def test_an_update_moves_vips_and_ranges() -> None:
    services = stored(a_service(vips=["10.0.0.1", "10.0.0.2"], cidrs=["10.1.0.0/16"]))
    new = a_service(vips=["10.0.0.2", "10.0.0.3"], cidrs=["10.2.0.0/16"])
    services.put(new)
    assert at(services, "10.0.0.1") is at(services, "10.1.0.1") is None
    assert at(services, "10.0.0.2") == at(services, "10.0.0.3") == at(services, "10.2.0.1") == new


def test_an_update_that_keeps_a_range_is_seen_through_it() -> None:
    services = stored(a_service(cidrs=["10.1.0.0/16"]))
    new = a_service(cidrs=["10.1.0.0/16"], port_map={443: 8443})
    services.put(new)
    assert at(services, "10.1.2.3") == new
    services.remove(new.key)
    assert at(services, "10.1.2.3") is None


def test_an_update_does_not_cost_the_place_among_sharers() -> None:
    one = a_service("one.example.com", vips=["10.0.0.1"])
    two = a_service("two.example.com", vips=["10.0.0.1"])
    services = stored(one, two)
    changed = a_service("one.example.com", vips=["10.0.0.1"], port_map={1: 1})
    services.put(changed)
    assert at(services, "10.0.0.1", "shop") == changed
    assert list(services.sharing_vip(HERE, parse_ip("10.0.0.1"))) == [changed, two]
    assert services.sharing_vip(HERE, parse_ip("10.0.0.9")) == ()
    services.remove(changed.key)
    assert at(services, "10.0.0.1", "shop") == two


EXACT = a_service("exact", ns="a", vips=["10.0.0.1"])
WIDE = a_service("wide", ns="a", cidrs=["10.0.0.0/8"])
NARROW = a_service("narrow", ns="b", cidrs=["10.0.0.0/24"])
NARROW_CANONICAL = a_service("canon", ns="c", cidrs=["10.0.0.0/24"], canonical=True)
HIDDEN = a_service("hidden", ns="h", vips=["10.0.0.1"], visibility=Visibility.NAMESPACE)
EVERYTHING = a_service("all", ns="e", cidrs=["0.0.0.0/0"])
EVERYTHING_V6 = a_service("all6", ns="e", cidrs=["::/0"])


@pytest.mark.parametrize(
    ("services", "ip", "client", "expected"),
    [
        pytest.param([WIDE, NARROW, EXACT], "10.0.0.1", "b", EXACT, id="exact beats range"),
        pytest.param([WIDE, NARROW], "10.0.0.1", "x", NARROW, id="the longest prefix"),
        pytest.param([WIDE, NARROW], "10.0.0.1", "a", WIDE, id="own namespace beats prefix"),
        pytest.param([WIDE, NARROW], "10.0.1.1", "x", WIDE, id="outside the narrow one"),
        pytest.param([NARROW, NARROW_CANONICAL], "10.0.0.1", "x", NARROW_CANONICAL, id="canonical"),
        pytest.param(
            [NARROW, NARROW_CANONICAL], "10.0.0.1", "b", NARROW, id="own before canonical"
        ),
        pytest.param([HIDDEN, WIDE], "10.0.0.1", "x", WIDE, id="an invisible exact falls through"),
        pytest.param([HIDDEN, WIDE], "10.0.0.1", "h", HIDDEN, id="visible at home"),
        pytest.param([EVERYTHING], "2001:db8::1", "x", None, id="v4 never matches v6"),
        pytest.param([EVERYTHING_V6], "10.0.0.1", "x", None, id="nor v6 v4"),
        pytest.param([EVERYTHING, EVERYTHING_V6], "10.0.0.1", "x", EVERYTHING, id="default route"),
        pytest.param([WIDE], "11.0.0.1", "x", None, id="outside"),
    ],
)
def test_ranges(services: list[Service], ip: str, client: str, expected: Service | None) -> None:
    assert at(stored(*services), ip, client) == expected


def test_endpoints_come_before_or_after_their_service() -> None:
    services = Services()
    pod = an_endpoint("a")
    services.put_endpoint(pod, None)
    assert {key: list(pods) for key, pods in services.staged().items()} == {KEY: [pod]}
    services.put(CART)
    assert list(services.endpoints(CART)) == [pod]
    assert not services.staged()


def test_a_service_that_comes_back_has_its_endpoints() -> None:
    services = stored(CART)
    services.put_endpoint(an_endpoint("a"), None)
    services.remove(KEY)
    services.put(CART)
    assert [pod.name for pod in services.endpoints(CART)] == ["a"]


def test_a_change_of_health_policy_brings_the_unhealthy_back() -> None:
    services = stored(CART)
    services.put_endpoint(an_endpoint("sick", Health.UNHEALTHY), None)
    assert list(services.endpoints(CART)) == []
    open_cart = a_service(load_balancer=ALLOW_ALL)
    services.put(open_cart)
    assert [pod.name for pod in services.endpoints(open_cart)] == ["sick"]
    services.put(CART)
    assert list(services.endpoints(CART)) == []


def test_a_workload_update_leaves_the_services_it_no_longer_names() -> None:
    services = stored(CART)
    old, new = an_endpoint("a"), an_endpoint("a", key="shop/other")
    services.put_endpoint(old, None)
    services.put_endpoint(new, old)
    assert list(services.endpoints(CART)) == []
    assert list(services.endpoints_of(ServiceKey("shop/other")).members) == ["a"]
    services.remove_endpoint(new)
    assert not services.staged()
