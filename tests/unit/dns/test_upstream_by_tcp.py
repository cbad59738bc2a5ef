from __future__ import annotations

import socket
from contextlib import suppress

import dns.message
import pytest
import trio
import trio.testing

from tests.support.dns_asking import ANSWER, MESSAGE, ask_by_tcp, right
from tests.support.resolvers import a_resolver, answered, silence
from tests.support.tunnels import open_descriptors
from ztunnel.dns import upstream
from ztunnel.errors import UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.wire import dns as wire

TRANSFER = dns.message.make_query("example.org", "AXFR", id=4711).to_wire()


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """Jumps only when nothing has happened for a while: sockets have time to deliver."""
    return trio.testing.MockClock(autojump_threshold=0.05)


async def test_by_tcp_a_query_goes_on_as_it_came() -> None:
    async with a_resolver(right) as resolver:
        assert await ask_by_tcp(resolver.endpoint) == [ANSWER]
    assert resolver.asked == [MESSAGE]


async def test_by_tcp_a_cancelled_query_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody_accepts:
        before = open_descriptors()
        with trio.move_on_after(0.05) as scope:
            await ask_by_tcp(Endpoint.of(nobody_accepts.getsockname()))
        assert scope.cancelled_caught
        assert open_descriptors() == before


async def test_by_tcp_a_silent_resolver_is_given_up(
    patient_clock: trio.testing.MockClock,
) -> None:
    async with a_resolver(silence) as resolver:
        with pytest.raises(UnreachableError, match="timed out"):
            await ask_by_tcp(resolver.endpoint)


async def test_by_tcp_chatter_is_no_reason_to_wait(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sock = trio.socket.from_stdlib_socket(listener)

    async def chat() -> None:
        stream, _ = await sock.accept()
        with stream, suppress(OSError):
            while True:
                await stream.send(wire.framed(b"nothing that anybody asked for"))
                await trio.sleep(1)

    with sock:
        nursery.start_soon(chat)
        start = trio.current_time()
        with pytest.raises(UnreachableError, match="timed out"):
            await ask_by_tcp(Endpoint.of(sock.getsockname()))
        assert trio.current_time() - start < upstream.ANSWER_SECONDS + 1


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
        return [first, stranger, b"", rest]

    async with a_resolver(script, close_after=1) as resolver:
        delivered = await ask_by_tcp(resolver.endpoint, message=TRANSFER)
    assert [wire.message_id_of(answer) for answer in delivered] == [4711, 4711]


async def test_a_zone_transfer_ends_when_nothing_more_comes(
    patient_clock: trio.testing.MockClock,
) -> None:
    async with a_resolver(right) as resolver:
        assert len(await ask_by_tcp(resolver.endpoint, message=TRANSFER)) == 1
