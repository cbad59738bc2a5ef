from __future__ import annotations

import random
import socket

import dns.message
import dns.rcode
import pytest
import trio
import trio.testing

from tests.support.resolvers import a_resolver, answered, silence
from tests.support.tunnels import open_descriptors
from ztunnel.dns import upstream
from ztunnel.dns.upstream import Upstream, servers_of
from ztunnel.errors import LimitError, UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire import dns as wire
from ztunnel.wire.dns import Query

OURS = SocketFactory(netns=None, mark=None, keepalive=None)
MESSAGE = dns.message.make_query("example.org", "A", id=4711).to_wire()
TRANSFER = dns.message.make_query("example.org", "AXFR", id=4711).to_wire()
RECORD = "example.org. 60 IN A 192.0.2.1"
ANSWER = answered(MESSAGE, RECORD)


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """Jumps only when nothing has happened for a while: sockets have time to deliver."""
    return trio.testing.MockClock(autojump_threshold=0.05)


def a_query(message: bytes = MESSAGE) -> Query:
    query = wire.parse_query(message)
    assert isinstance(query, Query)
    return query


def an_upstream() -> Upstream:
    return Upstream(OURS, random.Random(1))


def right(data: bytes, number: int) -> list[bytes]:
    return [answered(data, RECORD)]


async def ask(*servers: Endpoint, asking: Upstream | None = None) -> bytes:
    return await (asking or an_upstream()).ask_datagram(MESSAGE, a_query(), servers)


async def ask_by_tcp(*servers: Endpoint, message: bytes = MESSAGE) -> list[bytes]:
    delivered: list[bytes] = []

    async def deliver(answer: bytes) -> None:
        await trio.lowlevel.checkpoint()
        delivered.append(answer)

    await an_upstream().ask_stream(message, a_query(message), servers, deliver)
    return delivered


async def test_by_udp_the_answer_comes_back_with_the_id_of_the_query() -> None:
    async with a_resolver(right) as resolver:
        assert await ask(resolver.endpoint) == ANSWER
    assert resolver.asked[0][2:] == MESSAGE[2:]
    assert resolver.asked[0][:2] != MESSAGE[:2]


async def test_by_tcp_the_answer_comes_back_with_the_id_of_the_query() -> None:
    async with a_resolver(right) as resolver:
        assert await ask_by_tcp(resolver.endpoint) == [ANSWER]
    assert resolver.asked[0][:2] != MESSAGE[:2]


async def test_answers_to_something_else_are_ignored() -> None:
    other = dns.message.make_query("evil.example", "A").to_wire()

    def script(data: bytes, number: int) -> list[bytes]:
        forged = [
            wire.with_id(answered(data, RECORD), wire.message_id_of(data) ^ 1),
            wire.with_id(answered(other), wire.message_id_of(data)),
            data,
            b"",
            b"\0" * 7,
        ]
        return [*forged, answered(data, RECORD)]

    async with a_resolver(script) as resolver:
        assert await ask(resolver.endpoint) == ANSWER
        assert await ask_by_tcp(resolver.endpoint) == [ANSWER]


async def test_a_lost_query_is_sent_again(patient_clock: trio.testing.MockClock) -> None:
    def script(data: bytes, number: int) -> list[bytes]:
        return right(data, number) if number == 2 else []

    async with a_resolver(script) as resolver:
        assert await ask(resolver.endpoint) == ANSWER
    assert resolver.asked[0] == resolver.asked[1]


async def test_a_silent_resolver_is_given_up_before_the_client_asks_again(
    patient_clock: trio.testing.MockClock,
) -> None:
    started = trio.current_time()
    async with a_resolver(silence) as resolver:
        with pytest.raises(UnreachableError, match="timed out"):
            await ask(resolver.endpoint)
    assert len(resolver.asked) == 2
    assert trio.current_time() - started == pytest.approx(4.5, abs=0.2)


async def test_a_second_resolver_is_asked_after_the_first(
    patient_clock: trio.testing.MockClock,
) -> None:
    async with a_resolver(silence) as dead, a_resolver(right) as alive:
        assert await ask(dead.endpoint, alive.endpoint) == ANSWER
    assert len(dead.asked) == 1


async def test_a_closed_port_is_known_at_once() -> None:
    async with a_resolver(silence) as resolver:
        closed = resolver.endpoint
    with trio.fail_after(1), pytest.raises(UnreachableError, match="refused"):
        await ask(closed)
    with trio.fail_after(1), pytest.raises(UnreachableError, match="refused"):
        await ask_by_tcp(closed)


async def test_without_a_resolver_nothing_can_be_asked() -> None:
    with pytest.raises(UnreachableError, match="no resolver"):
        await ask()
    with pytest.raises(UnreachableError, match="no resolver"):
        await ask_by_tcp()


@pytest.mark.parametrize("ask_it", [ask, ask_by_tcp])
async def test_an_address_nobody_can_reach_is_an_outcome(ask_it) -> None:
    with pytest.raises(UnreachableError):
        await ask_it(Endpoint.parse("[fe80::1]:53"))


async def test_a_slow_resolver_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(upstream, "QUERIES_PER_SERVER_MAX", 3)
    asking = an_upstream()
    async with a_resolver(silence) as slow, a_resolver(right) as quick:
        for _ in range(3):
            nursery.start_soon(lambda: ask(slow.endpoint, asking=asking))
        await trio.testing.wait_all_tasks_blocked()
        assert asking.queries == 3
        with pytest.raises(LimitError, match="too many"):
            await ask(slow.endpoint, asking=asking)
        assert await ask(quick.endpoint, asking=asking) == ANSWER
        nursery.cancel_scope.cancel()


async def test_all_queries_together_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(upstream, "QUERIES_MAX", 1)
    asking = an_upstream()
    async with a_resolver(silence) as slow, a_resolver(right) as quick:
        nursery.start_soon(lambda: ask(slow.endpoint, asking=asking))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LimitError, match="too many"):
            await ask(quick.endpoint, asking=asking)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_query_leaves_nothing() -> None:
    asking = an_upstream()
    async with a_resolver(silence) as resolver:
        before = open_descriptors()
        with trio.move_on_after(0.05) as scope:
            await ask(resolver.endpoint, asking=asking)
        assert scope.cancelled_caught
        assert open_descriptors() == before
        assert asking.queries == 0


async def test_by_tcp_a_cancelled_query_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody_accepts:
        before = open_descriptors()
        with trio.move_on_after(0.05) as scope:
            await ask_by_tcp(Endpoint.of(nobody_accepts.getsockname()))
        assert scope.cancelled_caught
        assert open_descriptors() == before


async def test_places_are_given_back() -> None:
    asking = an_upstream()
    async with a_resolver(right) as resolver:
        for _ in range(3):
            await ask(resolver.endpoint, asking=asking)
    assert asking.queries == 0
    assert not asking._by_server


async def test_by_tcp_a_silent_resolver_is_given_up(
    patient_clock: trio.testing.MockClock,
) -> None:
    async with a_resolver(silence) as resolver:
        with pytest.raises(UnreachableError, match="timed out"):
            await ask_by_tcp(resolver.endpoint)


async def test_by_tcp_a_resolver_that_hangs_up_has_not_answered() -> None:
    async with a_resolver(silence, close_after=1) as resolver:
        with pytest.raises(UnreachableError, match="closed without an answer"):
            await ask_by_tcp(resolver.endpoint)


async def test_by_tcp_a_resolver_that_resets_has_not_answered(nursery: trio.Nursery) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sock = trio.socket.from_stdlib_socket(listener)

    async def reset() -> None:
        stream, _ = await sock.accept()
        await stream.recv(100)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.close()

    with sock:
        nursery.start_soon(reset)
        with pytest.raises(UnreachableError, match="reset"):
            await ask_by_tcp(Endpoint.of(sock.getsockname()))


async def test_by_tcp_a_resolver_that_cannot_be_reached_in_time_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream, "CONNECT_SECONDS", 0)
    async with a_resolver(right) as resolver:
        with pytest.raises(UnreachableError, match="connection timed out"):
            await ask_by_tcp(resolver.endpoint)


async def test_a_connect_that_is_cancelled_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody_accepts:
        before = open_descriptors()
        with trio.move_on_after(0) as scope:
            await ask_by_tcp(Endpoint.of(nobody_accepts.getsockname()))
        assert scope.cancelled_caught
        assert open_descriptors() == before


async def test_a_zone_transfer_has_several_answers() -> None:
    def script(data: bytes, number: int) -> list[bytes]:
        first = answered(data, "example.org. 60 IN NS ns.example.org.")
        rest = first[:4] + bytes(8)  # no question any more
        stranger = wire.with_id(rest, wire.message_id_of(data) ^ 1)
        return [first, stranger, rest]

    async with a_resolver(script, close_after=1) as resolver:
        delivered = await ask_by_tcp(resolver.endpoint, message=TRANSFER)
    assert [wire.message_id_of(answer) for answer in delivered] == [4711, 4711]


async def test_a_zone_transfer_ends_when_nothing_more_comes(
    patient_clock: trio.testing.MockClock,
) -> None:
    async with a_resolver(right) as resolver:
        assert len(await ask_by_tcp(resolver.endpoint, message=TRANSFER)) == 1


def test_resolv_conf_is_read_as_resolvers_do() -> None:
    text = """
# comment
search example.org
nameserver 192.0.2.1
nameserver\t2001:db8::1
  nameserver 192.0.2.2 # trailing
nameserver fe80::1%eth0
nameserver nonsense
nameserver
options ndots:5
"""
    assert [str(server) for server in servers_of(text)] == [
        "192.0.2.1:53",
        "[2001:db8::1]:53",
        "192.0.2.2:53",
        "[fe80::1]:53",
    ]
