from __future__ import annotations

from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
import structlog
import structlog.testing
import trio
import trio.testing

from tests.support.builders import a_service, a_workload
from tests.support.dns import FakeClient
from tests.support.dns_bench import CART, Bench, a_query
from tests.support.resolvers import a_resolver, answered, silence
from ztunnel.dns import answers, resolver as module
from ztunnel.dns.resolver import Pending, Transport
from ztunnel.model.network import Endpoint, parse_ip
from ztunnel.state.store import Update
from ztunnel.telemetry.log import PIPELINE
from ztunnel.wire.dns import Query

UDP, TCP = Transport.UDP, Transport.TCP


def records(message: dns.message.Message) -> list[str]:
    return [line for rrset in message.answer for line in str(rrset).split("\n")]


def test_a_mesh_name_is_answered_at_once() -> None:
    bench = Bench()
    assert records(bench.answer(a_query())) == ["cart.shop. 30 IN A 10.0.0.1"]
    assert bench.count("dns_requests") == 1
    assert bench.count("dns_upstream_requests") == 0
    assert bench.count("dns_answers", "mesh", "noerror") == 1


def test_an_answer_that_is_remembered_has_the_id_of_who_asks() -> None:
    bench = Bench()
    assert bench.answer(a_query(number=1)).id == 1
    assert bench.answer(a_query(number=2)).id == 2
    assert bench.count("dns_requests") == 2


def test_nothing_is_remembered_longer_than_the_store_stays_the_same() -> None:
    bench = Bench()
    bench.answer(a_query())
    bench.store.apply(Update(services=[a_service(vips=["10.0.0.9"])]))
    assert records(bench.answer(a_query())) == ["cart.shop. 30 IN A 10.0.0.9"]
    bench.store.apply(Update(removed_services=[CART.key]))
    assert isinstance(bench.resolver.ask(a_query(), UDP), Pending)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMO_ENTRIES_MAX", 3)
    bench = Bench()
    for number in range(10):
        bench.resolver.ask(a_query(f"x{number}.example.org"), UDP)
    assert len(bench.resolver._memo) == 3
    bench.resolver.ask(a_query() + bytes(module.MEMO_QUERY_BYTES_MAX), UDP)
    assert len(bench.resolver._memo) == 3
    assert len(bench.resolver._plans) == 3


def a_fresh_query(number: int, **more: object) -> bytes:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, number.to_bytes(8, "big"))
    return a_query(options=[cookie], **more)


def test_a_question_is_judged_once_whatever_else_is_in_the_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[Query] = []

    def plan(query: Query, *rest: Any) -> answers.Plan:
        judged.append(query)
        return decide(query, *rest)

    decide = answers.plan
    monkeypatch.setattr(answers, "plan", plan)
    bench = Bench()
    for number in range(5):
        assert records(bench.answer(a_fresh_query(number))) == ["cart.shop. 30 IN A 10.0.0.1"]
    assert len(judged) == 1
    bench.store.apply(Update(services=[a_service(vips=["10.0.0.9"])]))
    assert records(bench.answer(a_fresh_query(6))) == ["cart.shop. 30 IN A 10.0.0.9"]


def test_one_question_is_answered_as_each_query_wants_it() -> None:
    bench = Bench()
    for _ in range(2):
        small = bench.answer(a_fresh_query(1, use_edns=0, payload=700))
        assert (small.payload, small.rcode()) == (700, 0)
        assert bench.answer(a_fresh_query(2, use_edns=1)).rcode() == dns.rcode.BADVERS
        assert bench.answer(a_query()).opt is None
        assert str(bench.answer(a_query("CART.shop")).question[0].name) == "CART.shop."


@pytest.mark.parametrize("data", [b"", b"short", b"\0\1\x80\0" + bytes(8)])
def test_some_messages_deserve_no_answer(data: bytes) -> None:
    assert Bench().resolver.ask(data, UDP) is None


def test_a_malformed_query_is_refused_at_once() -> None:
    bench = Bench()
    assert bench.answer(a_query()[:20]).rcode() == dns.rcode.FORMERR
    assert bench.count("dns_answers", "proxy", "formerr") == 1


@pytest.mark.parametrize(
    ("transport", "edns", "kept"),
    [(UDP, -1, 30), (UDP, 0, 74), (TCP, -1, 200), (TCP, 0, 200)],
)
def test_an_answer_has_as_much_room_as_the_client_says(
    transport: Transport, edns: int, kept: int
) -> None:
    bench = Bench(a_service(vips=[f"10.0.0.{n}" for n in range(200)]))
    reply = bench.answer(a_query(use_edns=edns, payload=1232), transport)
    assert len(records(reply)) == kept
    assert bool(reply.flags & dns.flags.TC) == (kept < 200)


def test_answers_come_in_changing_order() -> None:
    bench = Bench(a_service(vips=["10.0.0.1", "10.0.0.2", "10.0.0.3"]))
    assert len({tuple(records(bench.answer(a_query()))) for _ in range(60)}) == 6


@pytest.mark.parametrize("by", [UDP, TCP])
async def test_another_name_is_asked_upstream(by: Transport) -> None:
    bench, data = Bench(), a_query("example.org")
    record = "example.org. 60 IN A 192.0.2.1"
    async with a_resolver(lambda asked, _: [answered(asked, record)]) as upstream:
        for number in (1, 2):
            data = a_query("example.org", number=number)
            assert await bench.finish(data, upstream.endpoint, by=by) == [answered(data, record)]
    labels = ("a", by, "web", "v1")
    assert bench.count("dns_requests", *labels) == 2
    assert bench.count("dns_upstream_requests", *labels) == 2
    assert bench.count("dns_upstream_failures", *labels) == 0
    assert sum(bench.metrics.dns_upstream_seconds.histogram(*labels).counts) == 2


@pytest.mark.parametrize("rcode", [dns.rcode.NXDOMAIN, dns.rcode.REFUSED, dns.rcode.SERVFAIL])
async def test_what_upstream_says_of_other_names_is_passed_on(rcode: dns.rcode.Rcode) -> None:
    bench, data = Bench(), a_query("example.org")
    async with a_resolver(lambda asked, _: [answered(asked, rcode=rcode)]) as upstream:
        assert await bench.finish(data, upstream.endpoint) == [answered(data, rcode=rcode)]
    assert bench.count("dns_upstream_failures") == 1
    assert bench.count("dns_answers", "upstream", dns.rcode.to_text(rcode).lower()) == 1


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (dns.rcode.NXDOMAIN, dns.rcode.NOERROR),
        (dns.rcode.REFUSED, dns.rcode.NOERROR),
        (dns.rcode.SERVFAIL, dns.rcode.SERVFAIL),
        (dns.rcode.NOERROR, dns.rcode.NOERROR),
    ],
)
async def test_a_mesh_name_never_does_not_exist(
    said: dns.rcode.Rcode, heard: dns.rcode.Rcode
) -> None:
    bench, data = Bench(), a_query("cart.shop.svc.cluster.local", "HTTPS")
    async with a_resolver(lambda asked, _: [answered(asked, rcode=said)]) as upstream:
        (answer,) = await bench.finish(data, upstream.endpoint)
    reply = dns.message.from_wire(answer)
    assert (reply.id, reply.rcode()) == (4711, heard)
    assert bool(reply.authority) == (said != heard)
    source = "upstream" if said == heard else "mesh"
    assert bench.count("dns_answers", source, dns.rcode.to_text(heard).lower()) == 1


async def test_records_that_upstream_has_of_a_mesh_name_are_passed_on() -> None:
    bench, data = Bench(a_service("api.example.com", vips=["10.0.0.1"])), b""
    data = a_query("api.example.com", "TXT")
    record = 'api.example.com. 60 IN TXT "hello"'
    async with a_resolver(lambda asked, _: [answered(asked, record)]) as upstream:
        assert await bench.finish(data, upstream.endpoint) == [answered(data, record)]


@pytest.mark.parametrize("by", [UDP, TCP])
async def test_a_failure_upstream_is_servfail(by: Transport) -> None:
    bench = Bench()
    async with a_resolver(silence) as upstream:
        closed = upstream.endpoint
    (answer,) = await bench.finish(a_query("example.org"), closed, by=by)
    reply = dns.message.from_wire(answer)
    assert (reply.id, reply.rcode()) == (4711, dns.rcode.SERVFAIL)
    assert bench.count("dns_upstream_failures", "a", by, "web", "v1") == 1
    assert bench.count("dns_answers", "proxy", "servfail") == 1


async def test_a_limit_upstream_is_servfail_and_counted() -> None:
    bench = Bench()
    bench.upstream.queries = 10_000
    (answer,) = await bench.finish(a_query("example.org"), Endpoint.parse("127.0.0.1:53"))
    assert dns.message.from_wire(answer).rcode() == dns.rcode.SERVFAIL
    assert bench.count("limits_reached", "dns_queries_per_pod") == 1


def test_a_query_without_a_place_is_servfail_and_counted() -> None:
    bench = Bench()
    outcome = bench.resolver.ask(a_query("example.org"), UDP)
    assert isinstance(outcome, Pending)
    assert dns.message.from_wire(bench.resolver.refuse(outcome)).rcode() == dns.rcode.SERVFAIL
    assert bench.count("limits_reached", "dns_queries_per_pod") == 1


async def test_a_pod_that_becomes_known_is_answered(nursery: trio.Nursery) -> None:
    bench = Bench(client=FakeClient(None))
    answers: list[list[bytes]] = []

    async def ask() -> None:
        answers.append(await bench.finish(a_query()))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    assert answers == []
    bench.client.known = a_workload("web", canonical_name="web", canonical_revision="v1")
    bench.client.told.set()
    await trio.testing.wait_all_tasks_blocked()
    assert records(dns.message.from_wire(answers[0][0])) == ["cart.shop. 30 IN A 10.0.0.1"]
    assert bench.count("dns_requests") == 1


async def test_a_pod_that_becomes_known_may_ask_upstream() -> None:
    bench = Bench(client=FakeClient(None))
    outcome = bench.resolver.ask(a_query("example.org"), UDP)
    assert isinstance(outcome, Pending)
    bench.client.known = a_workload("web")
    bench.client.told.set()
    async with a_resolver(lambda asked, _: [answered(asked)]) as upstream:
        delivered = await bench.finish_stream(outcome, upstream.endpoint)
    assert delivered == [answered(a_query("example.org"))]
    assert bench.count("dns_requests", "a", "udp", "unknown", "unknown") == 1


async def test_a_pod_that_stays_unknown_gets_servfail(autojump_clock: object) -> None:
    bench = Bench(client=FakeClient(None))
    (answer,) = await bench.finish(a_query())
    assert dns.message.from_wire(answer).rcode() == dns.rcode.SERVFAIL
    assert bench.count("dns_requests", "a", "udp", "unknown", "unknown") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cart.shop", ["10.0.0.1", "2001:db8::1"]),
        ("CART.shop.", ["10.0.0.1", "2001:db8::1"]),
        ("example.org", None),
    ],
)
def test_others_may_look_up_mesh_names(name: str, expected: list[str] | None) -> None:
    found = Bench().resolver.local_addresses(name)
    assert (None if found is None else sorted(map(str, found))) == expected


def test_others_learn_nothing_for_a_pod_that_is_unknown() -> None:
    assert Bench(client=FakeClient(None)).resolver.local_addresses("cart.shop") is None
    assert parse_ip("10.0.0.1") in (Bench().resolver.local_addresses("cart") or [])


async def test_each_query_has_a_line_for_debugging() -> None:
    bench = Bench()
    PIPELINE.change("dns=debug")
    try:
        with structlog.testing.capture_logs() as lines:
            bench.answer(a_query())
            bench.answer(a_query("cart.shop.svc.cluster.local"))
            await bench.finish(a_query("example.org", "TXT"))
    finally:
        PIPELINE.change(reset=True)
    common = {
        "event": "",
        "log_level": "debug",
        "src.workload": "web",
        "src.namespace": "shop",
    }
    assert lines[0] == {
        **common,
        "query": "a",
        "domain": "cart.shop",
        "result": "success",
        "endpoints": 1,
    }
    assert lines[2] == {
        **common,
        "query": "txt",
        "domain": "example.org",
        "result": "forwarding failed: no resolver is known",
        "endpoints": 0,
    }
    assert len(lines) == 3
