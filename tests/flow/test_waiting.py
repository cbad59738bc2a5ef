"""Connections that wait, idle or carry much: holds, limits and splicing."""

from __future__ import annotations

import pytest
import trio
from msgspec import structs

from tests.support.builders import allow
from tests.support.flow import Pair, a_pair, connect, expect_abort
from tests.support.peers import echo, echo_and_check, read_exactly, read_to_end
from ztunnel.model.workload import PolicyKey, TunnelProtocol
from ztunnel.proxy import supervision
from ztunnel.transport import splice


def naming_a_policy(pair: Pair) -> None:
    pair.mesh.put(structs.replace(pair.server_workload, policies=(PolicyKey("shop/allow"),)))


async def test_a_policy_that_is_named_but_late_holds_connections_until_it_comes() -> None:
    async with a_pair(policy_wait_seconds=20.0) as pair:
        pair.serve(echo)
        naming_a_policy(pair)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            await pair.lines.wait_for("connection opened", "outbound")
            await trio.testing.wait_all_tasks_blocked()
            pair.mesh.put(allow("shop/frontend"))
            assert await read_exactly(stream, 5) == b"hello"
            await stream.send_eof()
            assert await read_to_end(stream) == b""
        outbound, inbound = await pair.ends()
        assert outbound["level"] == inbound["level"] == "info"


async def test_a_policy_that_never_comes_refuses() -> None:
    async with a_pair(policy_wait_seconds=0.05) as pair:
        pair.serve(echo)
        naming_a_policy(pair)
        async with await pair.call() as stream:
            await expect_abort(stream)
        _, inbound = await pair.ends()
        assert "shop/allow applies to the workload but has not arrived" in inbound["error"]
        assert inbound["reason"] == "denied"


async def test_plaintext_waits_for_a_named_policy_too() -> None:
    async with a_pair(policy_wait_seconds=0.05) as pair:
        naming_a_policy(pair)
        async with connect(pair.plaintext) as stream:
            await expect_abort(stream)
        (inbound,) = await pair.lines.wait_for_ends(1)
        assert "has not arrived" in inbound["error"]


async def test_with_the_reference_behaviour_a_missing_policy_is_skipped() -> None:
    async with a_pair(policy_wait_seconds=0.0) as pair:
        pair.serve(echo)
        naming_a_policy(pair)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"


@pytest.fixture
def looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "COUNT_SECONDS", 0.02)


@pytest.mark.usefixtures("looked_at_often")
async def test_an_idle_connection_is_cut_where_the_operator_wants_that() -> None:
    async with a_pair(idle_seconds=0.1) as pair:
        pair.serve(echo)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await expect_abort(stream) == b"hello"
        assert "connection idle for" in (await pair.lines.wait_for("connection idle"))
        assert pair.mesh.node.metrics.limits_reached.count("idle").value >= 1


@pytest.mark.usefixtures("looked_at_often")
async def test_a_connection_half_closed_for_long_is_cut_where_the_operator_wants_that() -> None:
    async with a_pair(half_open_seconds=0.1) as pair:

        async def never_answers(stream: trio.SocketStream) -> None:
            async with stream:
                await trio.sleep_forever()

        pair.serve(never_answers)
        async with await pair.call() as stream:
            await stream.send_eof()
            assert await expect_abort(stream) == b""
        await pair.lines.wait_for("connection half open for")


async def test_passed_through_bytes_survive_the_change_to_splicing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipes = []
    make = splice.SplicePipe.make

    def noted() -> splice.SplicePipe | None:
        pipes.append(pipe := make())
        return pipe

    monkeypatch.setattr(splice.SplicePipe, "make", noted)
    async with a_pair(protocol=TunnelProtocol.NONE) as pair:
        pair.serve(echo)
        await echo_and_check(pair.call, streams=3, size=5_000_000)
        ends = await pair.lines.wait_for_ends(3)
        assert {end.bytes for end in ends} == {(5_000_000, 5_000_000)}
        assert len(pipes) == 6


async def test_a_splicing_connection_carries_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.transport.socket_relay.WORTH_BYTES", 1)
    async with a_pair(protocol=TunnelProtocol.NONE) as pair:

        async def answers_and_dies(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"last words")
            stream.socket.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER 0
            await stream.aclose()

        pair.serve(answers_and_dies)
        async with await pair.call() as stream:
            await stream.send_all(b"x" * 10)
            await trio.testing.wait_all_tasks_blocked()
            await expect_abort(stream)
        await pair.lines.wait_for_ends(1)


async def test_one_address_may_not_take_all_tunnels_of_a_pod() -> None:
    async with a_pair(max_tunnels_per_peer=2) as pair:
        first, second = connect(pair.hbone), connect(pair.hbone)
        async with first, second:
            await trio.testing.wait_all_tasks_blocked()
            async with connect(pair.hbone) as third:
                await expect_abort(third)
            (ended,) = await pair.lines.wait_for_ends(1)
            assert "has 2 HBONE connections to this pod already" in ended["error"]
            assert ended["reason"] == "limit"
        await pair.lines.wait_for_ends(3)
        # What has ended makes room again.
        pair.serve(echo)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
