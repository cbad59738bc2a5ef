from __future__ import annotations

import socket

import dns.message
import pytest
import trio
import trio.testing

from tests.support.dns_asking import (
    ANSWER,
    MESSAGE,
    RECORD,
    an_upstream,
    ask,
    ask_by_tcp,
    begin,
    right,
)
from tests.support.resolvers import a_resolver, answered, silence
from tests.support.tunnels import open_descriptors
from ztunnel.dns import ports, upstream
from ztunnel.dns.upstream import WAITS_SECONDS
from ztunnel.errors import LimitError, UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.wire import dns as wire


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """Jumps only when nothing has happened for a while: sockets have time to deliver."""
    return trio.testing.MockClock(autojump_threshold=0.05)


async def test_by_udp_the_answer_comes_back_with_the_id_of_the_query() -> None:
    async with a_resolver(right) as resolver:
        assert await ask(resolver.endpoint) == ANSWER
    assert resolver.asked[0][2:] == MESSAGE[2:]
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


async def test_a_lost_query_is_sent_again_from_elsewhere(
    patient_clock: trio.testing.MockClock,
) -> None:
    def script(data: bytes, number: int) -> list[bytes]:
        return right(data, number) if number == 2 else []

    async with a_resolver(script) as resolver:
        assert await ask(resolver.endpoint) == ANSWER
    first, second = resolver.asked
    assert first[2:] == second[2:]
    assert first[:2] != second[:2]


async def test_an_answer_to_the_first_of_two_sendings_is_welcome(
    patient_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "PORTS_PER_SERVER", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))
        server = trio.socket.from_stdlib_socket(resolver)
        async with an_upstream() as asking:
            ending = begin(asking, Endpoint.of(resolver.getsockname()))
            first, sender = await server.recvfrom(4096)
            _, other = await server.recvfrom(4096)
            assert other != sender
            await server.sendto(answered(first, RECORD), sender)
            assert await ending.answer() == ANSWER
            assert asking.queries == 0


async def test_a_silent_resolver_is_given_up_before_the_client_asks_again(
    patient_clock: trio.testing.MockClock,
) -> None:
    started = trio.current_time()
    async with a_resolver(silence) as resolver:
        with pytest.raises(UnreachableError, match="timed out"):
            await ask(resolver.endpoint)
    assert len(resolver.asked) == 2
    assert trio.current_time() - started == pytest.approx(4.5, abs=0.26)


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


async def test_after_a_refusal_the_second_resolver_is_asked_at_once() -> None:
    async with a_resolver(silence) as gone:
        pass
    async with a_resolver(right) as alive:
        with trio.fail_after(1):
            assert await ask(gone.endpoint, alive.endpoint) == ANSWER


async def test_a_late_refusal_by_the_first_resolver_changes_nothing(
    patient_clock: trio.testing.MockClock,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        second = trio.socket.from_stdlib_socket(sock)
        async with a_resolver(silence) as first, an_upstream() as asking:
            ending = begin(asking, first.endpoint, Endpoint.of(sock.getsockname()))
            data, sender = await second.recvfrom(4096)
            left = asking._servers[first.endpoint]
            (port,) = left._open
            left.give_up(port, ConnectionRefusedError(111, "refused"))
            assert ending.outcomes == []
            await second.sendto(answered(data, RECORD), sender)
            assert await ending.answer() == ANSWER


async def test_a_slow_resolver_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "QUERIES_PER_SERVER_MAX", 3)
    async with a_resolver(silence) as slow, a_resolver(right) as quick, an_upstream() as asking:
        endings = [begin(asking, slow.endpoint) for _ in range(4)]
        assert asking.queries == 3
        with pytest.raises(LimitError, match="too many"):
            await endings[3].answer()
        assert await begin(asking, quick.endpoint).answer() == ANSWER
        # Who may ask another is not held up by it.
        assert await begin(asking, slow.endpoint, quick.endpoint).answer() == ANSWER


async def test_all_queries_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "QUERIES_MAX", 1)
    async with a_resolver(silence) as slow, a_resolver(right) as quick, an_upstream() as asking:
        begin(asking, slow.endpoint)
        with pytest.raises(LimitError, match="too many"):
            await begin(asking, quick.endpoint).answer()


async def test_by_udp_nothing_is_sent_or_heard_after_the_end(
    patient_clock: trio.testing.MockClock,
) -> None:
    before = open_descriptors()
    async with a_resolver(silence) as resolver:
        async with an_upstream() as asking:
            ending = begin(asking, resolver.endpoint)
            asking.close()
            await trio.sleep(sum(WAITS_SECONDS) + 1)  # the reactor runs on, for other pods
            assert asking.queries == 0
        assert ending.outcomes == []
        assert len(resolver.asked) == 1
    assert open_descriptors() == before


async def test_places_are_given_back_and_idle_servers_forgotten(
    patient_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "PORT_SECONDS", 0.5)
    async with a_resolver(right) as resolver, a_resolver(right) as other, an_upstream() as asking:
        for _ in range(3):
            await begin(asking, resolver.endpoint).answer()
        assert (asking.queries, asking.ports_kept) == (0, 3)
        await trio.sleep(1)
        assert asking.ports_kept == 0
        await begin(asking, other.endpoint).answer()
        assert list(asking._servers) == [other.endpoint]
