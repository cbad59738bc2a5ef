from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload, an_identity
from ztunnel.decide.balance import Purpose
from ztunnel.decide.upstream import (
    Upstream,
    at_address,
    at_gateway,
    choose_ip,
    family_hint,
    is_passthrough,
    parse_names,
    refers_to,
)
from ztunnel.model.network import Endpoint, Network, Port, parse_ip
from ztunnel.model.service import BalanceMode, IpFamilies, LoadBalancer, Service
from ztunnel.model.workload import GatewayAddress, Workload
from ztunnel.state.store import Store

KEY = "shop/cart.shop.svc.cluster.local"
CALLER = a_workload("caller", ips=["192.0.2.99"])
POD = a_workload(services={KEY: {80: 8080}})
CART = a_service(vips=["10.0.0.1"])
ASIDE: dict[str, Any] = {
    "source": CALLER,
    "purpose": Purpose.STANDARD,
    "rng": random.Random(0),
}


def find(store: Store, target: str) -> Upstream | None:
    return at_address(store, Network(""), Endpoint.parse(target), **ASIDE)


def test_an_address_is_a_service_s_first() -> None:
    assert find(a_store(POD, CART), "10.0.0.1:80") == Upstream(POD, Port(8080), CART)
    assert find(a_store(POD, CART), "192.0.2.10:99") == Upstream(POD, Port(99))
    assert find(a_store(POD, CART), "192.0.2.11:99") is None


def test_an_address_that_is_both_depends_on_the_port() -> None:
    both = a_service(vips=["192.0.2.10"])
    store = a_store(POD, both)
    assert find(store, "192.0.2.10:80") == Upstream(POD, Port(8080), both)
    assert find(store, "192.0.2.10:81") == Upstream(POD, Port(81))


def test_passthrough_has_no_upstream() -> None:
    service = a_service(vips=["10.0.0.1"], load_balancer=LoadBalancer(mode=BalanceMode.PASSTHROUGH))
    assert is_passthrough(service)
    assert not is_passthrough(CART)
    assert find(a_store(POD, service), "10.0.0.1:80") is None


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (a_gateway("/10.0.0.1", 80), Upstream(POD, Port(8080), CART)),
        (a_gateway("/192.0.2.10", 15009), Upstream(POD, Port(15009))),
        (a_gateway(KEY, 80), Upstream(POD, Port(8080), CART)),
        (a_gateway("shop/named.example.com", 15009), None),
        (a_gateway("far/192.0.2.10", 15009), None),
    ],
)
def test_a_gateway_reference(reference: GatewayAddress, expected: Upstream | None) -> None:
    assert at_gateway(a_store(POD, CART), reference, **ASIDE) == expected


def test_a_gateway_reference_to_a_named_workload() -> None:
    named = a_workload("gw", hostname="named.example.com")
    found = at_gateway(a_store(named), a_gateway("shop/named.example.com", 15009), **ASIDE)
    assert found == Upstream(named, Port(15009))


DUAL = ("192.0.2.10", "2001:db8::10")


@pytest.mark.parametrize(
    ("ips", "families", "target", "expected"),
    [
        (DUAL, None, "10.0.0.1", "192.0.2.10"),
        (DUAL, None, "2001:db8::1", "2001:db8::10"),
        (DUAL, IpFamilies.IPV6_ONLY, "10.0.0.1", "2001:db8::10"),
        (DUAL, IpFamilies.IPV4_ONLY, "2001:db8::1", "192.0.2.10"),
        (DUAL, IpFamilies.IPV4_ONLY, "2001:db8::10", "2001:db8::10"),
        (("192.0.2.10",), None, "2001:db8::1", "192.0.2.10"),
        (("192.0.2.10",), IpFamilies.IPV6_ONLY, "10.0.0.1", None),
        ((), None, "10.0.0.1", None),
        (("192.0.2.11", "192.0.2.10"), None, "192.0.2.10", "192.0.2.10"),
        (("192.0.2.11", "192.0.2.10"), None, "192.0.2.9", "192.0.2.11"),
    ],
)
def test_the_address_of_the_chosen_workload(
    ips: tuple[str, ...], families: IpFamilies | None, target: str, expected: str | None
) -> None:
    upstream = Upstream(a_workload(ips=ips), Port(80), a_service(ip_families=families))
    wanted = parse_ip(expected) if expected else None
    assert choose_ip(upstream, parse_ip(target)) == wanted


def test_a_gateway_s_family_is_its_own_if_given_by_address() -> None:
    client = parse_ip("2001:db8::1")
    assert family_hint(a_gateway("/192.0.2.1"), client) == parse_ip("192.0.2.1")
    assert family_hint(a_gateway("shop/gw.example.com"), client) == client


def test_names_that_are_no_identities_are_set_aside() -> None:
    names = ("spiffe://td/ns/a/sa/b", "", "spiffe://td", "cluster.local/ns/a/sa/b")
    assert parse_names(names) == ((an_identity("b", "a", "td"),), names[1:])


def test_whom_to_accept() -> None:
    vouched = a_service(subject_alt_names=("spiffe://td/ns/a/sa/b", "junk"))
    upstream = Upstream(POD, Port(80), vouched)
    assert upstream.identities == (an_identity("b", "a", "td"), POD.identity)
    assert upstream.service_identities == (an_identity("b", "a", "td"),)
    assert upstream.ignored_names == ("junk",)
    alone = Upstream(POD, Port(80))
    assert (alone.identities, alone.ignored_names) == ((POD.identity,), ())


NAMED = a_workload("named", hostname="named.example.com", ips=[])


@pytest.mark.parametrize(
    ("reference", "workload", "expected"),
    [
        ("/192.0.2.10", POD, True),
        ("/192.0.2.11", POD, False),
        ("far/192.0.2.10", POD, False),
        ("/10.0.0.1", POD, True),
        ("/10.0.0.1", CALLER, False),
        (KEY, POD, True),
        (KEY, CALLER, False),
        ("shop/unknown", POD, False),
        ("shop/named.example.com", NAMED, True),
        ("bank/named.example.com", NAMED, False),
    ],
)
def test_who_is_meant_by_a_reference(reference: str, workload: Workload, *, expected: bool) -> None:
    store = a_store(POD, CALLER, NAMED, CART)
    assert refers_to(store, a_gateway(reference), workload) == expected


def test_an_upstream_reached_without_a_service_vouches_for_nobody() -> None:
    service: Service | None = None
    assert Upstream(POD, Port(80), service).service_identities == ()
