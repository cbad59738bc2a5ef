from __future__ import annotations

import random

import dns.flags
import dns.message
import dns.rdataclass
import pytest

from tests.support.builders import a_service, a_store, a_workload
from ztunnel.decide.names import Viewpoint
from ztunnel.dns import answers
from ztunnel.dns.answers import (
    BAD_VERSION,
    NO_RECORDS,
    RECORD_BYTES_MIN,
    SUCCESS,
    UNSUPPORTED,
    Forward,
    Local,
)
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.service import IpFamilies
from ztunnel.state.store import Store
from ztunnel.wire import dns as wire, dns_records
from ztunnel.wire.dns import Query, Reply

VIEW = Viewpoint(namespace=Namespace("ns1"), network=Network(""))
WEB = "web.ns1.svc.cluster.local"
STORE = a_store(
    a_service("cart.ns1.svc.cluster.local", ns="ns1", vips=["10.0.0.1", "2001:db8::1"]),
    a_service("cart.ns2.svc.cluster.local", ns="ns2", vips=["10.0.0.2"]),
    a_service("api.example.com", ns="ns1", vips=["10.0.0.3"]),
    a_service("*.b.example.com", ns="ns1", vips=["10.0.0.4"]),
    a_service("db.ns1.svc.cluster.local", ns="ns1", vips=["other/10.0.0.8"]),
    a_service(
        "v6only.ns1.svc.cluster.local", ns="ns1", ip_families=IpFamilies.IPV6_ONLY, port_map={}
    ),
    a_service(WEB, ns="ns1"),
    a_workload("web-0", ns="ns1", ips=["10.1.0.1"], services={f"ns1/{WEB}": {80: 8080}}),
    a_workload("web-1", ns="ns1", ips=["10.1.0.2"], services={f"ns1/{WEB}": {80: 8080}}),
)
ZONE = "ns.dns.{0} hostmaster.{0} 1 7200 1800 86400 30"
CLUSTER_ZONE = f"cluster.local. 30 IN SOA {ZONE.format('cluster.local.')}"


def a_query(name: str, rtype: str = "A", rdclass: str = "IN", **more: object) -> Query:
    query = wire.parse_query(dns.message.make_query(name, rtype, rdclass, **more).to_wire())
    assert isinstance(query, Query)
    return query


def planned(name: str, rtype: str = "A", store: Store = STORE, **more: object) -> Local | Forward:
    return answers.plan(a_query(name, rtype, **more), VIEW, store)


def printed(query: Query, reply: Reply) -> dns.message.Message:
    return dns.message.from_wire(wire.render(query, reply, limit=65535, message_id=0))


def records_of(name: str, rtype: str = "A", **more: object) -> list[str]:
    plan = planned(name, rtype, **more)
    assert isinstance(plan, Local)
    reply = printed(a_query(name, rtype, **more), plan.reply)
    assert reply.rcode() == 0
    assert reply.flags & dns.flags.AA
    return [line for rrset in reply.answer + reply.authority for line in str(rrset).split("\n")]


@pytest.mark.parametrize("change_case", [str.lower, str.upper])
@pytest.mark.parametrize(
    ("name", "rtype", "expected"),
    [
        ("cart", "A", ["cart. 30 IN A 10.0.0.1"]),
        ("cart", "AAAA", ["cart. 30 IN AAAA 2001:db8::1"]),
        ("cart.ns2.svc", "A", ["cart.ns2.svc. 30 IN A 10.0.0.2"]),
        (
            "cart.ns2.ns1.svc.cluster.local",
            "A",
            [
                "cart.ns2.ns1.svc.cluster.local. 30 IN CNAME cart.ns2.",
                "cart.ns2. 30 IN A 10.0.0.2",
            ],
        ),
        (
            "api.example.com.ns1.svc.cluster.local",
            "A",
            [
                "api.example.com.ns1.svc.cluster.local. 30 IN CNAME api.example.com.",
                "api.example.com. 30 IN A 10.0.0.3",
            ],
        ),
        (
            "a.b.example.com.ns1.svc.cluster.local",
            "A",
            ["a.b.example.com.ns1.svc.cluster.local. 30 IN A 10.0.0.4"],
        ),
        ("v6only.ns1.svc.cluster.local", "A", [CLUSTER_ZONE]),
        ("db.ns1.svc.cluster.local", "A", [CLUSTER_ZONE]),
        ("cart.ns2.svc.cluster.local", "AAAA", [CLUSTER_ZONE]),
        (
            "api.example.com",
            "AAAA",
            [f"api.example.com. 30 IN SOA {ZONE.format('api.example.com.')}"],
        ),
        ("web", "A", ["web. 30 IN A 10.1.0.1", "web. 30 IN A 10.1.0.2"]),
        (f"web-1.{WEB}", "A", [f"web-1.{WEB}. 30 IN A 10.1.0.2"]),
        (
            WEB,
            "SRV",
            [f"{WEB}. 30 IN SRV 0 50 8080 web-{n}.{WEB}." for n in (0, 1)],
        ),
        (f"web-1.{WEB}", "SRV", [f"web-1.{WEB}. 30 IN SRV 0 100 8080 web-1.{WEB}."]),
        (
            "_80._tcp.web",
            "SRV",
            [f"_80._tcp.web. 30 IN SRV 0 50 8080 web-{n}.{WEB}." for n in (0, 1)],
        ),
        (
            "_80._tcp.cart.ns2",
            "SRV",
            ["_80._tcp.cart.ns2. 30 IN SRV 0 100 80 cart.ns2.svc.cluster.local."],
        ),
        ("v6only.ns1.svc.cluster.local", "SRV", [CLUSTER_ZONE]),
        (
            "1.0.0.10.in-addr.arpa",
            "PTR",
            ["1.0.0.10.in-addr.arpa. 30 IN PTR cart.ns1.svc.cluster.local."],
        ),
        ("2.0.1.10.in-addr.arpa", "PTR", [f"2.0.1.10.in-addr.arpa. 30 IN PTR web-1.{WEB}."]),
    ],
)
def test_what_is_ours_is_answered(
    name: str, rtype: str, expected: list[str], change_case: object
) -> None:
    assert records_of(change_case(name), rtype) == expected


@pytest.mark.parametrize(
    ("name", "rtype", "result", "endpoints"),
    [
        ("cart", "A", SUCCESS, 1),
        ("web", "A", SUCCESS, 2),
        ("web", "SRV", SUCCESS, 2),
        ("cart.ns2", "AAAA", NO_RECORDS, 0),
        ("v6only", "A", UNSUPPORTED, 0),
        ("v6only", "AAAA", NO_RECORDS, 0),
    ],
)
def test_what_the_log_says_of_it(name: str, rtype: str, result: str, endpoints: int) -> None:
    plan = planned(name, rtype)
    assert isinstance(plan, Local)
    assert (plan.result, plan.endpoints) == (result, endpoints)


@pytest.mark.parametrize(
    ("name", "rtype"),
    [
        ("example.org", "A"),
        ("example.org", "HTTPS"),
        ("_http._tcp.web.ns1.svc.cluster.local", "SRV"),
        ("_grpclb._tcp.cart.ns1.svc.cluster.local", "SRV"),
        ("_81._tcp.web.ns1.svc.cluster.local", "SRV"),
        ("_80._udp.web.ns1.svc.cluster.local", "SRV"),
        ("_80._tcp.web.ns1.svc.cluster.local", "A"),
        ("_80._tcp.api.example.com", "SRV"),
        ("_80._tcp.example.org", "SRV"),
        ("9.9.9.9.in-addr.arpa", "PTR"),
        (".", "NS"),
    ],
)
def test_what_is_not_ours_is_asked_upstream(name: str, rtype: str) -> None:
    assert planned(name, rtype) == Forward()


CART = "cart.ns1.svc.cluster.local"


@pytest.mark.parametrize("rtype", ["HTTPS", "SVCB", "TXT", "MX", "NAPTR", "CAA", "ANY", "PTR"])
def test_other_types_of_our_names_never_do_not_exist(rtype: str) -> None:
    plan = planned(CART, rtype)
    assert isinstance(plan, Forward)
    assert plan.otherwise is not None
    reply = printed(a_query(CART, rtype), plan.otherwise)
    assert (reply.rcode(), reply.answer) == (0, [])
    assert [str(rrset) for rrset in reply.authority] == [CLUSTER_ZONE]


def test_the_services_of_a_name_with_an_address_are_the_clusters_to_tell_if_it_can() -> None:
    plan = planned(CART, "SRV")
    assert isinstance(plan, Forward)
    assert plan.otherwise is not None
    reply = printed(a_query(CART, "SRV"), plan.otherwise)
    assert [str(rrset) for rrset in reply.answer] == [f"{CART}. 30 IN SRV 0 100 80 {CART}."]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", [f"web-0.{WEB}. 30 IN A 10.1.0.1", f"web-1.{WEB}. 30 IN A 10.1.0.2"]),
        (f"web-0.{WEB}", [f"web-0.{WEB}. 30 IN A 10.1.0.1"]),
        ("_80._tcp.cart", [f"{CART}. 30 IN A 10.0.0.1", f"{CART}. 30 IN AAAA 2001:db8::1"]),
    ],
)
def test_addresses_of_targets_come_along(name: str, expected: list[str]) -> None:
    plan = planned(name, "SRV")
    assert isinstance(plan, Local)
    shuffled = answers.shuffled(plan.reply, random.Random(1), 512)
    for reply in (plan.reply, shuffled):
        additional = printed(a_query(name, "SRV"), reply).additional
        assert [str(rrset) for rrset in additional] == expected


def test_the_class_of_mesh_names_is_internet() -> None:
    assert planned("cart", rdclass="CH") == Forward()


def test_an_unknown_version_of_edns_is_refused_where_we_answer() -> None:
    plan = planned("cart", use_edns=1)
    assert isinstance(plan, Local)
    assert plan.result == BAD_VERSION
    assert printed(a_query("cart", use_edns=1), plan.reply).rcode() == 16
    assert planned("example.org", use_edns=1) == Forward()


def test_a_host_name_that_dns_cannot_carry_is_asked_upstream() -> None:
    store = a_store(a_service(f"{'x' * 70}.example.com", ns="ns1", vips=["10.0.0.1"]))
    assert planned("1.0.0.10.in-addr.arpa", "PTR", store) == Forward()


def test_many_pods_have_a_weight_each() -> None:
    pods = [
        a_workload(
            f"web-{n}",
            ns="ns1",
            ips=[f"10.1.{n // 250}.{n % 250}"],
            services={f"ns1/{WEB}": {80: 80}},
        )
        for n in range(300)
    ]
    plan = planned("web", "SRV", a_store(a_service(WEB, ns="ns1"), *pods))
    assert isinstance(plan, Local)
    [records] = printed(a_query("web", "SRV"), plan.reply).answer
    assert {record.weight for record in records} == {1}
    assert len(records) == 300


def test_answers_are_shuffled_but_what_leads_is_not() -> None:
    rng = random.Random(5)
    reply = Reply(leading=(b"first",), answers=[b"a", b"b", b"c"])
    orders = {tuple(answers.shuffled(reply, rng, 512).answers) for _ in range(100)}
    assert len(orders) == 6
    assert {answers.shuffled(reply, rng, 512).leading for _ in range(10)} == {(b"first",)}


def test_of_very_many_answers_one_more_is_drawn_than_fits() -> None:
    query = a_query("big.example.com")
    owner = dns_records.owner_of(query, query.name)
    ips = [parse_ip(f"10.0.{n // 250}.{n % 250}") for n in range(999)]
    reply = Reply(answers=[dns_records.address_record(owner, ip, 30) for ip in ips])
    assert {len(record) for record in reply.answers} == {RECORD_BYTES_MIN}
    seen: set[bytes] = set()
    for seed in range(200):
        drawn = answers.shuffled(reply, random.Random(seed), 512)
        assert len(set(drawn.answers)) == 512 // RECORD_BYTES_MIN + 1
        message = dns.message.from_wire(wire.render(query, drawn, limit=512, message_id=0))
        assert message.flags & dns.flags.TC
        seen.update(drawn.answers)
    assert len(seen) > 900


@pytest.mark.parametrize("few", [[], [b"a"]])
def test_few_answers_have_one_order(few: list[bytes]) -> None:
    reply = Reply(answers=few)
    assert answers.shuffled(reply, random.Random(1), 512) is reply
