from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_service, a_store, a_workload
from tests.support.names import (
    HEADLESS,
    a_headless_store,
    a_kube_service,
    a_view,
    addresses_of,
    found_for,
    kube,
)
from ztunnel.decide import names
from ztunnel.decide.names import Viewpoint
from ztunnel.model.identity import Namespace
from ztunnel.model.network import parse_ip
from ztunnel.model.service import (
    IpFamilies,
    Visibility,
)
from ztunnel.state.store import Store


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a", ["a.ns1.svc.cluster.local"]),
        ("a.b", ["a.b.svc.cluster.local", "a.b.ns1.svc.cluster.local"]),
        ("a.b.svc", ["a.b.svc.cluster.local", "a.b.svc.svc.cluster.local"]),
        ("a.b.c", ["a.b.c.svc.cluster.local"]),
        ("a.b.c.svc", ["a.b.c.svc.cluster.local"]),
        ("a.b.c.d", []),
        ("a.b.c.d.e", []),
    ],
)
def test_what_a_name_means_inside_kubernetes(name: str, meant: list[str]) -> None:
    assert names.expansions(name, a_view()) == meant


def test_aliases_come_in_order_and_know_what_was_left_of_the_name() -> None:
    assert list(names.aliases("cart.ns2.ns1.svc.cluster.local", a_view()).items()) == [
        ("cart.ns2.ns1.svc.cluster.local", None),
        ("cart.ns2", "cart.ns2"),
        ("cart.ns2.svc.cluster.local", "cart.ns2"),
        ("cart.ns2.ns1", "cart.ns2.ns1"),
        ("cart.ns2.ns1.svc", "cart.ns2.ns1.svc"),
    ]


def test_a_search_domain_alone_is_not_stripped() -> None:
    assert names.aliases("ns1.svc.cluster.local", a_view())["ns1"] == "ns1"
    assert "" not in names.aliases(".cluster.local", a_view())


@pytest.mark.parametrize(
    ("alias", "tried"),
    [
        ("x.y.z", ["x.y.z", "*.y.z", "*.z"]),
        ("x.y", ["x.y", "*.y"]),
        ("x", ["x"]),
    ],
)
def test_wildcards_widen_but_never_to_everything(alias: str, tried: list[str]) -> None:
    assert list(names.candidates(alias)) == tried


TABLE = a_store(
    a_kube_service("cart", "ns1", "10.0.0.1"),
    a_kube_service("cart", "ns2", "10.0.0.2"),
    a_service("api.example.com", ns="ns1", vips=["10.0.0.3"]),
    a_service("*.b.example.com", ns="ns1", vips=["10.0.0.4"]),
    a_service("*.wide.com", ns="ns1", vips=["10.0.0.5"]),
    a_service("exact.wide.com", ns="ns1", vips=["10.0.0.6"]),
    a_kube_service("hidden", "ns2", "10.0.0.7", visibility=Visibility.NAMESPACE),
    a_kube_service("db", "ns1", "other/10.0.0.8"),
    a_service("no-address.example.com", ns="ns1"),
    a_service("range.example.com", ns="ns1", cidrs=["10.9.0.0/16"]),
    a_service("a.b.c.d.svc.cluster.local", ns="ns1", vips=["10.0.0.9"]),
)


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("cart", ["10.0.0.1"]),
        ("cart.ns2", ["10.0.0.2"]),
        ("cart.ns2.svc", ["10.0.0.2"]),
        ("cart.ns2.svc.cluster.local", ["10.0.0.2"]),
        ("cart.ns1.svc.cluster.local", ["10.0.0.1"]),
        ("cart.ns2.ns1.svc.cluster.local", ["10.0.0.2"]),
        ("cart.svc.cluster.local", ["10.0.0.1"]),
        ("cart.cluster.local", ["10.0.0.1"]),
        ("cart.ns2.cluster.local", ["10.0.0.2"]),
        ("cart.ns2.svc.svc.cluster.local", ["10.0.0.2"]),
        ("api.example.com", ["10.0.0.3"]),
        ("api.example.com.ns1.svc.cluster.local", ["10.0.0.3"]),
        ("api.example.com.svc.cluster.local", ["10.0.0.3"]),
        ("api.example.com.cluster.local", ["10.0.0.3"]),
        ("api.example.com.ns2.svc.cluster.local", None),
        ("a.b.example.com", ["10.0.0.4"]),
        ("a.b.example.com.ns1.svc.cluster.local", ["10.0.0.4"]),
        ("deep.a.b.example.com", ["10.0.0.4"]),
        ("b.example.com", None),
        ("exact.wide.com", ["10.0.0.6"]),
        ("other.wide.com", ["10.0.0.5"]),
        ("hidden.ns2.svc.cluster.local", None),
        ("db.ns1.svc.cluster.local", []),
        ("no-address.example.com", None),
        ("range.example.com", None),
        ("a.b.c.d", None),
        ("a.b.c.d.svc.cluster.local", ["10.0.0.9"]),
        ("unknown.example.com", None),
        ("example.com", None),
        ("", None),
    ],
)
def test_which_addresses_a_name_has(name: str, addresses: list[str] | None) -> None:
    assert addresses_of(name, TABLE) == addresses


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("cart", "cart"),
        ("cart.ns2.svc", "cart.ns2.svc"),
        ("cart.ns1.svc.cluster.local", "cart.ns1.svc.cluster.local"),
        ("cart.ns2.ns1.svc.cluster.local", "cart.ns2"),
        ("api.example.com.ns1.svc.cluster.local", "api.example.com"),
        ("a.b.example.com.ns1.svc.cluster.local", "a.b.example.com.ns1.svc.cluster.local"),
    ],
)
def test_who_owns_the_records(name: str, owner: str) -> None:
    found = names.find(name, a_view(), TABLE.services)
    assert found is not None
    assert found.owner == owner


def test_the_cluster_domain_is_the_operators() -> None:
    store = a_store(a_service("cart.ns1.svc.my.domain", ns="ns1", vips=["10.0.0.1"]))
    view = a_view(cluster_domain="my.domain")
    assert addresses_of("cart.ns1", store, view=view) == ["10.0.0.1"]
    assert addresses_of("cart.ns1", store) is None


@pytest.mark.parametrize(
    ("search", "name", "addresses"),
    [
        (("corp.example",), "cart.ns2.corp.example", ["10.0.0.2"]),
        (("corp.example",), "api.example.com.corp.example", ["10.0.0.3"]),
        (("corp.example",), "cart.ns2.ns1.svc.cluster.local", None),
        (("corp.example",), "cart.ns1.svc.cluster.local", ["10.0.0.1"]),
        ((), "cart.ns2.cluster.local", None),
    ],
)
def test_a_search_list_that_is_known_takes_the_place_of_the_usual_one(
    search: tuple[str, ...], name: str, addresses: list[str] | None
) -> None:
    assert addresses_of(name, TABLE, view=a_view(search=search)) == addresses


HOST = "shared.example.com"


@pytest.mark.parametrize(
    ("namespaces", "preferred", "chosen"),
    [
        pytest.param(["ns2", "ns1"], None, "ns1", id="own namespace"),
        pytest.param(["ns2", "ns3!"], None, "ns3", id="canonical"),
        pytest.param(["ns2!", "ns3!"], None, "ns3", id="the last canonical"),
        pytest.param(["ns2", "ns3!", "ns1"], "ns2", "ns1", id="own before canonical"),
        pytest.param(["ns2", "ns3!", "ns4"], "ns4", "ns3", id="canonical before preferred"),
        pytest.param(["ns2", "ns3", "ns4"], "ns4", "ns4", id="preferred"),
        pytest.param(["ns2", "ns3", "ns4"], None, "ns2", id="first"),
        pytest.param(["ns1-", "ns2", "ns3!"], None, "ns3", id="own cannot be answered"),
        pytest.param(["ns1-", "ns2", "ns3"], "ns3", "ns3", id="own cannot, preferred can"),
        pytest.param(["ns1-", "ns2!", "ns3!"], "ns2", "ns3", id="own cannot, last canonical"),
        pytest.param(["ns2-", "ns3", "ns4"], None, "ns3", id="first that can be answered"),
        pytest.param(["ns2!-", "ns3?"], None, None, id="none that is visible and can be"),
        pytest.param(["ns2?"], None, None, id="invisible"),
        pytest.param(["ns1?"], None, "ns1", id="visible at home"),
    ],
)
def test_who_is_meant_by_a_shared_host_name(
    namespaces: list[str], preferred: str | None, chosen: str | None
) -> None:
    """`!` canonical, `-` without an address, `?` visible in its namespace only."""
    services = [
        a_service(
            HOST,
            ns=text.strip("!-?"),
            vips=[] if "-" in text else ["10.0.0.1"],
            canonical="!" in text,
            visibility=Visibility.NAMESPACE if "?" in text else Visibility.PUBLIC,
        )
        for text in namespaces
    ]
    view = a_view(preferred_namespace=Namespace(preferred) if preferred else None)
    found = names.find(HOST, view, a_store(*services).services)
    assert (found.service.namespace if found else None) == chosen


def test_one_that_cannot_be_answered_gives_way_to_a_wildcard() -> None:
    store = a_store(
        a_service("api.example.com", ns="ns1"),
        a_service("*.example.com", ns="ns1", vips=["10.0.0.1"]),
    )
    assert found_for("api.example.com", store) == "*.example.com"


@pytest.mark.parametrize(
    ("families", "ipv6", "version", "expected"),
    [
        (None, True, 4, ["10.0.0.1"]),
        (None, True, 6, ["2001:db8::1"]),
        (IpFamilies.DUAL, True, 6, ["2001:db8::1"]),
        (IpFamilies.IPV4_ONLY, True, 6, []),
        (IpFamilies.IPV4_ONLY, True, 4, ["10.0.0.1"]),
        (IpFamilies.IPV6_ONLY, True, 4, []),
        (None, False, 6, []),
        (None, False, 4, ["10.0.0.1"]),
    ],
)
def test_which_families_are_offered(
    families: IpFamilies | None,
    ipv6: bool,
    version: int,
    expected: list[str],
) -> None:
    store = a_store(a_kube_service("cart", "ns1", "10.0.0.1", "2001:db8::1", ip_families=families))
    view = a_view(ipv6=ipv6)
    assert addresses_of("cart", store, version, view) == expected
    found = names.find("cart", view, store.services)
    assert found is not None
    assert names.allows(found, version, view) == bool(expected)


def name_of(ip: str, store: Store, view: Viewpoint | None = None) -> str | None:
    return names.name_of(parse_ip(ip), view or a_view(), store.services, store.workloads)


def test_addresses_have_names() -> None:
    store = a_headless_store()
    assert name_of("10.1.0.1", store) == f"web-0.{HEADLESS}"
    assert name_of("10.0.0.1", TABLE) == kube("cart")
    assert name_of("10.0.0.3", TABLE) == "api.example.com"
    assert name_of("192.0.2.99", store) is None


@pytest.mark.parametrize(
    "ip",
    [
        pytest.param("10.0.0.4", id="a wildcard is no name"),
        pytest.param("10.0.0.7", id="not visible"),
        pytest.param("10.0.0.8", id="in another network"),
        pytest.param("10.9.0.1", id="in a range"),
    ],
)
def test_addresses_without_a_name_here(ip: str) -> None:
    assert name_of(ip, TABLE) is None


def test_a_workload_is_called_by_its_host_name_if_no_headless_service_has_it() -> None:
    store = a_store(
        a_workload("vm", ns="ns1", ips=["10.1.0.1"], hostname="vm.example.com"),
        a_workload("pod", ns="ns1", ips=["10.1.0.2"]),
    )
    assert name_of("10.1.0.1", store) == "vm.example.com"
    assert name_of("10.1.0.2", store) is None


def test_an_endpoint_is_not_named_after_services_that_do_not_name_it() -> None:
    hidden, addressed = kube("hidden", "ns2"), kube("addressed")
    services = {f"ns2/{hidden}": {80: 80}, f"ns1/{addressed}": {80: 80}, "ns1/gone": {80: 80}}
    store = a_store(
        a_service(hidden, ns="ns2", visibility=Visibility.NAMESPACE),
        a_service(addressed, ns="ns1", vips=["10.0.0.1"]),
        a_workload("web-0", ns="ns1", ips=["10.1.0.1"], services=services),
    )
    assert name_of("10.1.0.1", store) is None


def test_a_shared_address_is_called_after_the_service_that_ranks_first() -> None:
    store = a_store(
        a_service("theirs.example.com", ns="ns2", vips=["10.0.0.1"]),
        a_service("ours.example.com", ns="ns1", vips=["10.0.0.1"]),
    )
    assert name_of("10.0.0.1", store) == "ours.example.com"
    assert name_of("10.0.0.1", store, a_view("ns2")) == "theirs.example.com"


@given(ip=st.ip_addresses())
def test_reverse_names_are_read_as_they_are_written(ip) -> None:
    assert names.reversed_address(ip.reverse_pointer) == ip


@pytest.mark.parametrize(
    "name",
    [
        "in-addr.arpa",
        "3.2.1.in-addr.arpa",
        "5.4.3.2.1.in-addr.arpa",
        "256.0.0.1.in-addr.arpa",
        "a.0.0.1.in-addr.arpa",
        "ip6.arpa",
        "1.2.ip6.arpa",
        ".".join(["g"] * 32) + ".ip6.arpa",
        ".".join(["12"] * 32) + ".ip6.arpa",
        "cart.ns1.svc.cluster.local",
        "",
    ],
)
def test_other_names_are_no_reverse_names(name: str) -> None:
    assert names.reversed_address(name) is None


@given(name=st.text(alphabet="ab.*-_\\", max_size=60))
def test_any_name_is_found_or_not(name: str) -> None:
    view = a_view()
    found = names.find(name, view, TABLE.services)
    if found is not None:
        assert names.addresses(found, 4, view, TABLE.services) is not None
