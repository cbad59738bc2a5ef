from __future__ import annotations

import random
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.support.flow import abort, expect_abort
from tests.support.peers import random_bytes, read_exactly, read_to_end
from tests.support.tunnels import (
    Heard,
    TunnelPair,
    a_reactor,
    a_tunnel_pair,
    open_descriptors,
    socket_pair,
    stream_of,
)
from ztunnel.errors import DeniedError, PeerError
from ztunnel.transport import relay as module
from ztunnel.transport.buffers import UNIT_FIRST, UNIT_MOST
from ztunnel.transport.outbox import drop, rest
from ztunnel.transport.reactor import READABLE, Reactor
from ztunnel.transport.relay import StreamRelay
from ztunnel.wire.hbone.events import DataReceived
from ztunnel.wire.hbone.settings import HboneSettings

KIB, MIB = 1024, 1024 * 1024
SMALLEST = HboneSettings(stream_window=65_535, connection_window=65_535, max_frame_size=16 * KIB)
ODD = HboneSettings(max_frame_size=20_000)  # does not divide the largest read


class Joined:
    """Two applications with two relays and one stream between them."""

    def __init__(self, reactor: Reactor, tunnels: TunnelPair, stream: Any, served: Any) -> None:
        self.client_ended, self.server_ended = Heard(), Heard()
        near, self.client_sock = socket_pair()
        far, self.server_sock = socket_pair()
        self.client = StreamRelay(reactor, near, tunnels.client, stream, self.client_ended.ended)
        self.server = StreamRelay(reactor, far, tunnels.server, served, self.server_ended.ended)
        reactor.watch_input(near, self.client)
        reactor.register(far, self.server)
        self.client_app, self.server_app = stream_of(self.client_sock), stream_of(self.server_sock)

    async def ends(self) -> tuple[Any, Any]:
        """Wait until both relays have ended; give their errors."""
        return (await self.client_ended.until("ended"))[0], (
            await self.server_ended.until("ended")
        )[0]


@asynccontextmanager
async def joined(**settings: Any) -> AsyncIterator[Joined]:
    before = open_descriptors()
    async with a_reactor() as reactor, a_tunnel_pair(reactor, **settings) as tunnels:
        stream, served = await tunnels.a_stream()
        both = Joined(reactor, tunnels, stream, served)
        both.reactor, both.tunnels = reactor, tunnels  # type: ignore[attr-defined]
        yield both
        both.client.cut(PeerError("the test is over"))
        both.server.cut(PeerError("the test is over"))
        await both.client_app.aclose()
        await both.server_app.aclose()
        with trio.fail_after(5):
            await both.ends()
    assert open_descriptors() <= before + 1  # the reactor's last descriptors go with its task


def in_pieces(content: bytes, seed: int, most: int = 100_000) -> list[bytes]:
    dice = random.Random(seed)
    pieces, position = [], 0
    while position < len(content):
        size = dice.choice([1, 7, 4096, 4097, most])
        pieces.append(content[position : position + size])
        position += size
    return pieces


async def send_and_finish(stream: trio.SocketStream, pieces: list[bytes]) -> None:
    for piece in pieces:
        await stream.send_all(piece)
    await stream.send_eof()


@pytest.mark.parametrize("own_records", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="as we are"),
        pytest.param({"client_settings": SMALLEST, "server_settings": SMALLEST}, id="smallest"),
        pytest.param({"client_settings": ODD, "server_settings": ODD}, id="odd frames"),
    ],
)
async def test_every_byte_arrives_in_order_both_ways(settings: dict, *, own_records: bool) -> None:
    contents = [random_bytes(3 * MIB, seed=1), random_bytes(2 * MIB, seed=2)]
    received: dict[int, bytes] = {}

    async def receive(number: int, stream: trio.SocketStream) -> None:
        received[number] = await read_to_end(stream)

    async with joined(own_records=own_records, **settings) as both:
        apps = [both.client_app, both.server_app]
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in (0, 1):
                    pieces = in_pieces(contents[number], number)
                    nursery.start_soon(send_and_finish, apps[number], pieces)
                    nursery.start_soon(receive, 1 - number, apps[number])
        assert [received[0], received[1]] == contents
        assert await both.ends() == (None, None)
        assert (both.client.read_bytes, both.client.written_bytes) == (3 * MIB, 2 * MIB)
        assert (both.server.read_bytes, both.server.written_bytes) == (2 * MIB, 3 * MIB)


@pytest.mark.parametrize("first", ["client", "server"])
async def test_whoever_finishes_first_still_hears_the_other(first: str) -> None:
    async with joined() as both:
        one, other = both.client_app, both.server_app
        if first == "server":
            one, other = other, one
        await one.send_all(b"the last word of one")
        await one.send_eof()
        assert await read_to_end(other) == b"the last word of one"
        await other.send_all(b"not of the other")
        assert await read_exactly(one, 16) == b"not of the other"
        await other.send_eof()
        assert await read_to_end(one) == b""
        assert await both.ends() == (None, None)


@pytest.mark.parametrize("who", ["client", "server"])
async def test_an_abort_crosses_as_an_abort(who: str) -> None:
    async with joined() as both:
        one, other = both.client_app, both.server_app
        if who == "server":
            one, other = other, one
        await one.send_all(b"x")
        await read_exactly(other, 1)
        abort(one)
        assert await expect_abort(other) == b""
        errors = dict(zip(("client", "server"), await both.ends(), strict=True))
        # Leaving is no failure of whoever's application left; the other side is told.
        assert errors.pop(who) is None
        [told] = errors.values()
        assert str(told) == "peer reset the stream (code 8)"


def shrink(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_a_slow_reader_holds_one_window_and_no_more_and_gets_all_in_the_end() -> None:
    content = random_bytes(1 * MIB, seed=3)
    settings = {"server_settings": SMALLEST}
    async with joined(**settings) as both:
        shrink(both.server.sock)
        sent = trio.Event()

        async def send() -> None:
            await send_and_finish(both.client_app, [content])
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received = b""
            worst = 0
            while len(received) < len(content):
                await trio.testing.wait_all_tasks_blocked()
                worst = max(worst, sum(map(len, both.server._pending or ())))
                received += await both.server_app.receive_some(50_000)
        assert received == content
        assert 0 < worst <= SMALLEST.stream_window
        assert await read_to_end(both.server_app) == b""


async def test_what_is_pending_is_delivered_before_the_end() -> None:
    content = random_bytes(300_000, seed=4)
    async with joined() as both:
        shrink(both.server.sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_finish, both.client_app, [content])
            await trio.testing.wait_all_tasks_blocked()
            assert await read_to_end(both.server_app) == content


async def test_an_abort_is_seen_even_while_the_other_side_reads_nothing() -> None:
    async with joined(server_settings=SMALLEST) as both:
        shrink(both.server.sock)
        with trio.move_on_after(0.1):
            for _ in range(400):
                await both.client_app.send_all(bytes(100_000))
        abort(both.client_app)
        with trio.fail_after(5):
            errors = await both.ends()
        assert errors[0] is None
        assert isinstance(errors[1], PeerError)


async def test_an_answer_given_in_the_middle_of_an_upload_is_delivered() -> None:
    async with joined() as both:
        await both.client_app.send_all(b"begin")
        await read_exactly(both.server_app, 5)
        await both.client_app.send_all(b"more that nobody reads")
        await trio.testing.wait_all_tasks_blocked()
        await both.server_app.send_all(b"413")
        both.server_sock.close()
        both.server_app.socket.close()  # with data unread: the kernel resets
        # The relay learns of it when it writes, before it has read the answer.
        await both.client_app.send_all(b"and more")
        assert await read_exactly(both.client_app, 3) == b"413"


async def test_a_cut_is_an_abort_for_both_applications_and_names_its_reason() -> None:
    async with joined() as both:
        reason = DeniedError("connection closed due to policy change")
        both.server.cut(reason)
        both.server.cut(PeerError("too late"))
        assert await expect_abort(both.server_app) == b""
        assert await expect_abort(both.client_app) == b""
        told, cut = await both.ends()
        assert cut is reason
        assert str(told) == "peer reset the stream (code 8)"


async def test_a_reset_without_an_error_is_an_end_in_good_order() -> None:
    async with joined() as both:
        tunnel, served = both.tunnels.server, both.server._stream  # type: ignore[attr-defined]
        tunnel.core.queue_data(served, b"all that there is")
        tunnel.core.reset(served, 0)  # RFC 9113 s8.1: answered, and the rest is not wanted
        tunnel.flush_later()
        assert await read_to_end(both.client_app) == b"all that there is"
        assert await both.client_ended.until("ended") == (None,)


async def test_a_lost_tunnel_is_an_abort_for_the_application() -> None:
    async with joined() as both:
        both.tunnels.server.close()  # type: ignore[attr-defined]
        assert await expect_abort(both.client_app) == b""
        errors = await both.ends()
        assert all(isinstance(error, PeerError) for error in errors)


async def test_thousands_of_tiny_frames_are_written_at_once_or_kept_as_one() -> None:
    content = random_bytes(5000, seed=5)
    async with joined() as both:
        tunnel, stream = both.tunnels.client, both.client._stream  # type: ignore[attr-defined]
        shrink(both.server.sock)
        for _ in range(20):
            for byte in content:
                tunnel.core.queue_data(stream, bytes([byte]))
            tunnel.flush()
        await trio.testing.wait_all_tasks_blocked()
        # One piece for each read of the tunnel, not one for each of a hundred thousand frames.
        assert len(both.server._pending or ()) < 1000
        received = await read_exactly(both.server_app, 20 * len(content))
        assert received == content * 20


async def test_bytes_that_come_one_by_one_for_a_slow_reader_are_kept_together() -> None:
    content = random_bytes(60_000, seed=7)
    async with joined() as both:
        relay, stream = both.server, both.server._stream
        relay.sock.send(bytes(8 * MIB))  # as much as the application's socket takes
        for byte in content:
            # One event each, as when every frame comes in a packet of its own.
            relay.on_data(DataReceived(stream, [memoryview(bytes([byte]))], 1))
        assert len(relay._pending or ()) < 20
        assert relay._holding == len(content)


async def test_a_preface_comes_first_and_is_neither_counted_nor_credited() -> None:
    header = random_bytes(300_000, seed=6)
    async with joined() as both:
        shrink(both.server.sock)
        both.server.preface(header)
        await both.client_app.send_all(b"hello")
        assert await read_exactly(both.server_app, len(header) + 5) == header + b"hello"
        await trio.testing.wait_all_tasks_blocked()
        assert both.server.written_bytes == 5
        assert both.server._stream.owed == 5


async def test_a_stream_whose_end_we_have_not_been_told_of_yet_sends_nothing_more() -> None:
    async with joined() as both:
        relay = both.client
        # As when a reset came, and another stream's event of the same read lets us go on first.
        relay._tunnel.core.reset(relay._stream, 8)
        both.client_sock.send(b"too late")
        relay.on_event(READABLE)
        assert relay.read_bytes == 0


async def test_a_bug_ends_its_stream_and_not_the_tunnel() -> None:
    async with joined() as both:
        both.client.fail(RuntimeError("a bug"))
        error, _ = await both.ends()
        assert str(error) == "internal error: a bug"
        await both.tunnels.a_stream()  # type: ignore[attr-defined]


async def test_a_busy_stream_yields_after_its_share_of_a_turn(monkeypatch) -> None:
    monkeypatch.setattr(module, "READS_PER_TURN", 1)
    content = random_bytes(2 * MIB, seed=7)
    async with joined() as both, trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, both.client_app, [content])
        assert await read_to_end(both.server_app) == content


async def test_after_a_read_of_the_largest_unit_others_have_their_turn(monkeypatch) -> None:
    monkeypatch.setattr(module, "UNIT_MOST", UNIT_FIRST)
    monkeypatch.setattr(module, "grown", lambda unit, size: unit)
    async with joined() as both:
        both.client_sock.send(bytes(3 * UNIT_FIRST))
        both.client.on_event(READABLE)  # nothing is awaited: this is one turn
        assert both.client.read_bytes == UNIT_FIRST


async def test_a_window_that_is_almost_used_up_does_not_make_a_busy_stream_start_over() -> None:
    async with joined() as both:
        both.client._unit = UNIT_MOST
        both.client._stream.send_window = 20_000
        both.client_sock.send(bytes(50_000))
        both.client.on_event(READABLE)
        assert both.client.read_bytes == 20_000
        assert both.client._unit == UNIT_MOST


@given(pieces=st.lists(st.binary(max_size=20)), data=st.data())
def test_what_is_left_after_a_partial_write(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    sent = data.draw(st.integers(0, len(whole)))
    assert rest([memoryview(piece) for piece in pieces], sent) == whole[sent:]
    pending = deque(memoryview(piece) for piece in pieces if piece)
    drop(pending, sent)
    assert b"".join(pending) == whole[sent:]
