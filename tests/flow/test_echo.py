from __future__ import annotations

from functools import partial

import pytest
import trio

from tests.support.flow import Pair, a_pair, abort
from tests.support.peers import (
    download_and_check,
    echo,
    echo_and_check,
    random_bytes,
    read_exactly,
    read_to_end,
    sink,
    source,
    upload_and_check,
)
from ztunnel.model.workload import TunnelProtocol

BOTH_RECORD_LAYERS = pytest.mark.parametrize("own_records", [True, False])
MIB = 1024 * 1024


@BOTH_RECORD_LAYERS
async def test_sixteen_streams_share_a_tunnel_and_carry_every_byte(*, own_records: bool) -> None:
    async with a_pair(own_records=own_records) as pair:
        pair.serve(echo)
        await echo_and_check(pair.call, streams=16, size=300_000, seed=1)
        ends = await pair.lines.wait_for_ends(32)
        assert {(end["level"], end.bytes) for end in ends} == {("info", (300_000, 300_000))}
        assert len(pair.client.pool) == len(pair.server.tunnels) == 1


@BOTH_RECORD_LAYERS
async def test_bulk_fills_the_largest_units(*, own_records: bool) -> None:
    async with a_pair(own_records=own_records) as pair:
        pair.serve(echo)
        await echo_and_check(pair.call, streams=2, size=12 * MIB, seed=2)


async def test_without_a_tunnel_the_bytes_pass_as_they_are() -> None:
    async with a_pair(protocol=TunnelProtocol.NONE) as pair:
        pair.serve(echo)
        await echo_and_check(pair.call, streams=4, size=2 * MIB, seed=3)
        ends = await pair.lines.wait_for_ends(4)
        assert {end.bytes for end in ends} == {(2 * MIB, 2 * MIB)}
        assert {end["direction"] for end in ends} == {"outbound"}
        assert len(pair.client.pool) == 0


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_the_client_finishes_first_and_still_gets_the_answer(
    protocol: TunnelProtocol,
) -> None:
    async with a_pair(protocol=protocol) as pair:
        pair.serve(sink)
        await upload_and_check(pair.call, size=500_000, seed=4)
        ends = await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)
        assert {end["level"] for end in ends} == {"info"}


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_the_server_finishes_first_and_still_hears_the_client(
    protocol: TunnelProtocol,
) -> None:
    async with a_pair(protocol=protocol) as pair:
        pair.serve(source)
        await download_and_check(pair.call, size=500_000)
        ends = await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)
        assert {end["level"] for end in ends} == {"info"}


async def test_both_sides_count_the_same_bytes_from_their_own_point_of_view() -> None:
    async with a_pair() as pair:
        pair.serve(sink)
        await upload_and_check(pair.call, size=123_456, seed=5)
        outbound, inbound = await pair.ends()
        assert outbound.bytes == (123_456, 32)
        assert inbound.bytes == (32, 123_456)
        assert outbound["src.identity"] == inbound["src.identity"]
        assert outbound["dst.hbone_addr"] == inbound["dst.hbone_addr"]
        assert outbound["dst.service"] == inbound["dst.service"] == "cart.shop.svc.cluster.local"


async def test_one_stalled_reader_does_not_slow_the_others_of_its_tunnel() -> None:
    async with a_pair() as pair:
        stalled = trio.Event()

        async def app(stream: trio.SocketStream) -> None:
            if await stream.receive_some(1) == b"s":
                stalled.set()
                await trio.sleep_forever()
            await echo(stream)

        pair.serve(app)
        async with trio.open_nursery() as nursery:
            slow = await pair.call()
            sent = trio.Event()
            nursery.start_soon(send_too_much, slow, sent)
            await stalled.wait()
            async with trio.open_nursery() as others:
                for number in range(99):
                    others.start_soon(echo_a_little, pair, number)
            assert not sent.is_set()
            assert len(pair.client.pool) == 1
            nursery.cancel_scope.cancel()
        abort(slow)
        ends = await pair.lines.wait_for_ends(200)
        assert sum(end["level"] == "info" for end in ends) == 199


async def send_too_much(stream: trio.SocketStream, sent: trio.Event) -> None:
    """Send more than all buffers on the way hold together."""
    piece = bytes(MIB)
    await stream.send_all(b"s")
    for _ in range(100):
        await stream.send_all(piece)
    sent.set()


async def echo_a_little(pair: Pair, number: int) -> None:
    content = random_bytes(2000, seed=number)
    async with await pair.call() as stream:
        await stream.send_all(b"e" + content)
        assert await read_exactly(stream, len(content)) == content
        await stream.send_eof()
        assert await read_to_end(stream) == b""


async def test_an_answer_and_an_end_that_come_with_the_connect_both_arrive() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")
        await stream.aclose()

    async with a_pair() as pair:
        pair.serve(greet)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(partial(expect, pair, b"hello"))
        await pair.lines.wait_for_ends(40)


async def expect(pair: Pair, content: bytes) -> None:
    async with await pair.call() as stream:
        assert await read_to_end(stream) == content


async def test_tunnels_and_their_handshakes_are_counted() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        await echo_and_check(pair.call, streams=2, size=100, seed=1)
        text = "".join(pair.mesh.node.metrics.text())
        for reporter in ("source", "destination"):
            assert f'ztunnel_tunnels{{reporter="{reporter}"}} 1\n' in text
            counted = f'ztunnel_tls_handshake_duration_seconds_count{{reporter="{reporter}"}} 1\n'
            assert counted in text
        pair.client.pool.close()
        await pair.lines.wait_for_ends(4)
        with trio.fail_after(5):
            while len(pair.server.tunnels):  # noqa: ASYNC110 - nobody tells of it
                await trio.sleep(0.01)
        text = "".join(pair.mesh.node.metrics.text())
        for reporter in ("source", "destination"):
            assert f'ztunnel_tunnels{{reporter="{reporter}"}} 0\n' in text
