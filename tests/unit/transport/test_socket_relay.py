from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from tests.support.flow import abort, expect_abort
from tests.support.peers import random_bytes, read_exactly, read_to_end
from tests.support.tunnels import Heard, a_reactor, open_descriptors, socket_pair, stream_of
from ztunnel.errors import DeniedError, PeerError
from ztunnel.transport import socket_relay as module
from ztunnel.transport.buffers import UNIT_MOST
from ztunnel.transport.socket_relay import SocketRelay

MIB = 1024 * 1024


class Joined:
    """Two applications with a relay between them."""

    def __init__(self, relay: SocketRelay, ended: Heard, *apps: socket.socket) -> None:
        self.relay, self.ended = relay, ended
        self.client, self.server = map(stream_of, apps)

    async def end(self) -> object:
        return (await self.ended.until("ended"))[0]


@asynccontextmanager
async def joined() -> AsyncIterator[Joined]:
    before = open_descriptors()
    async with a_reactor() as reactor:
        near, client = socket_pair()
        far, server = socket_pair()
        ended = Heard()
        relay = SocketRelay(reactor, near, far, ended.ended)
        reactor.register(near, relay.downstream)
        reactor.register(far, relay.upstream)
        both = Joined(relay, ended, client, server)
        yield both
        relay.cut(PeerError("the test is over"))
        await both.client.aclose()
        await both.server.aclose()
        assert len(ended.calls) == 1
    assert open_descriptors() <= before + 1  # the reactor's last descriptors go with its task


def shrink(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def send_and_finish(stream: trio.SocketStream, content: bytes) -> None:
    await stream.send_all(content)
    await stream.send_eof()


async def test_every_byte_arrives_in_order_both_ways_and_is_counted() -> None:
    up, down = random_bytes(3 * MIB, seed=1), random_bytes(2 * MIB, seed=2)
    received: dict[str, bytes] = {}

    async def receive(name: str, stream: trio.SocketStream) -> None:
        received[name] = await read_to_end(stream)

    async with joined() as both:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_and_finish, both.client, up)
                nursery.start_soon(send_and_finish, both.server, down)
                nursery.start_soon(receive, "down", both.client)
                nursery.start_soon(receive, "up", both.server)
        assert received == {"up": up, "down": down}
        assert await both.end() is None
        assert (both.relay.sent_bytes, both.relay.received_bytes) == (len(up), len(down))
        assert both.relay.over


@pytest.mark.parametrize("first", ["client", "server"])
async def test_whoever_finishes_first_still_hears_the_other(first: str) -> None:
    async with joined() as both:
        one, other = both.client, both.server
        if first == "server":
            one, other = other, one
        await send_and_finish(one, b"my last word")
        assert await read_to_end(other) == b"my last word"
        await send_and_finish(other, b"not mine")
        assert await read_to_end(one) == b"not mine"
        assert await both.end() is None


@pytest.mark.parametrize("who", ["client", "server"])
async def test_an_abort_crosses_as_an_abort_and_is_no_failure(who: str) -> None:
    async with joined() as both:
        one, other = both.client, both.server
        if who == "server":
            one, other = other, one
        abort(one)
        assert await expect_abort(other) == b""
        assert await both.end() is None


async def test_a_slow_reader_stops_its_sender_and_gets_all_in_the_end() -> None:
    content = random_bytes(500_000, seed=3)
    async with joined() as both, trio.open_nursery() as nursery:
        shrink(both.relay.upstream.sock)
        nursery.start_soon(send_and_finish, both.client, content)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < len(both.relay.downstream._pending or b"") <= UNIT_MOST
        # What is pending comes before the end.
        assert await read_to_end(both.server) == content


async def test_an_abort_is_seen_even_while_the_other_side_reads_nothing() -> None:
    async with joined() as both:
        shrink(both.relay.upstream.sock)
        with trio.move_on_after(0.1):
            for _ in range(400):
                await both.client.send_all(bytes(100_000))
        abort(both.client)
        with trio.fail_after(5):
            assert await both.end() is None


async def test_an_answer_given_in_the_middle_of_an_upload_is_delivered() -> None:
    async with joined() as both:
        await both.client.send_all(b"begin")
        await read_exactly(both.server, 5)
        await both.client.send_all(b"more that nobody reads")
        await trio.testing.wait_all_tasks_blocked()
        # In one turn: the answer and the reset come, and the relay writes before it reads.
        await both.server.send_all(b"413")
        both.server.socket.close()
        both.relay.downstream._send(memoryview(b"x"))
        both.relay.downstream._send(memoryview(b"x"))
        assert await read_exactly(both.client, 3) == b"413"
        assert await both.end() is None


async def test_whoever_resets_before_saying_anything_is_an_abort_also_when_seen_in_writing() -> (
    None
):
    async with joined() as both:
        abort(both.server)
        both.relay.downstream._send(memoryview(b"x"))
        assert await expect_abort(both.client) == b""
        assert await both.end() is None


async def test_a_cut_is_an_abort_for_both_and_names_its_reason() -> None:
    async with joined() as both:
        reason = DeniedError("connection closed due to policy change")
        both.relay.cut(reason)
        assert await expect_abort(both.client) == b""
        assert await expect_abort(both.server) == b""
        assert await both.end() is reason


async def test_a_bug_ends_the_pair() -> None:
    async with joined() as both:
        both.relay.upstream.fail(RuntimeError("a bug"))
        assert str(await both.end()) == "internal error: a bug"


async def test_a_busy_pair_yields_after_its_share_of_a_turn(monkeypatch) -> None:
    monkeypatch.setattr(module, "READS_PER_TURN", 1)
    content = random_bytes(2 * MIB, seed=4)
    async with joined() as both, trio.open_nursery() as nursery:
        nursery.start_soon(partial(send_and_finish, both.client, content))
        assert await read_to_end(both.server) == content
