from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.certs import a_name
from tests.support.pools import KEY, a_lab, end
from tests.support.tunnels import (
    Heard,
    a_permit,
    open_descriptors,
)
from ztunnel.errors import DrainError, LimitError, PeerTimeoutError, UnreachableError, ZtunnelError
from ztunnel.model.network import Endpoint, parse_ip
from ztunnel.transport import attempt, pool as module, reactor as reactor_module
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.events import RequestReceived
from ztunnel.wire.hbone.settings import HboneSettings


@pytest.mark.parametrize(
    ("most", "number", "tunnels"),
    [
        pytest.param(3, 2, 1, id="two fit"),
        pytest.param(2, 4, 2, id="four do not fit into two"),
        pytest.param(101, 100, 1, id="a hundred fit into a hundred and one"),
    ],
)
async def test_how_many_tunnels_concurrent_streams_need(
    most: int, number: int, tunnels: int
) -> None:
    async with a_lab(streams_per_tunnel=most) as lab:
        await lab.open_many(number)
        assert len(lab.dialled) == len(lab.pool) == tunnels
        assert max(len(pair.client.core.streams) for pair in lab.peers) <= most


async def test_two_and_then_two_more_share_one_tunnel_when_there_is_room() -> None:
    async with a_lab(streams_per_tunnel=3) as lab:
        for _ in range(2):
            for tunnel, stream in await lab.open_many(2):
                end(tunnel, stream)
        assert len(lab.dialled) == 1


async def test_a_tunnel_that_was_full_is_used_again_when_there_is_room() -> None:
    async with a_lab(streams_per_tunnel=1) as lab:
        tunnel, stream = await lab.open()
        other, _ = await lab.open()
        assert other is not tunnel
        end(tunnel, stream)
        assert (await lab.open())[0] is tunnel


async def test_the_peers_own_limit_counts_too() -> None:
    async with a_lab(streams_per_tunnel=100) as lab:
        lab.peer_settings = HboneSettings(max_concurrent_streams=2)
        await lab.open_many(4)
        assert len(lab.dialled) == 2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"source": a_name("backend")}, id="another identity of ours"),
        pytest.param({"expected": (a_name("bank"),)}, id="another one expected"),
        pytest.param({"expected": ()}, id="nobody expected"),
        pytest.param({"peer": Endpoint.parse("192.0.2.2:15008")}, id="another peer"),
        pytest.param({"source_ip": parse_ip("192.0.2.10")}, id="another source address"),
    ],
)
async def test_what_differs_in_anything_never_shares_a_tunnel(other: dict[str, Any]) -> None:
    async with a_lab() as lab:
        ours, _ = await lab.open()
        theirs, _ = await lab.open(replace(KEY, **other))
        assert ours is not theirs
        assert lab.pool.get(KEY) is ours


async def test_everyone_who_waits_shares_one_dial_and_its_failure() -> None:
    async with a_lab() as lab:
        lab.gate = trio.Event()
        lab.fail_with = UnreachableError("refused")
        errors: list[ZtunnelError] = []

        async def one() -> None:
            try:
                await lab.open()
            except ZtunnelError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            lab.gate.set()
        assert len(lab.dialled) == 1
        assert errors == [lab.fail_with] * 50


async def test_a_failure_is_remembered_for_a_moment_and_then_tried_again(monkeypatch) -> None:
    monkeypatch.setattr(module, "NEGATIVE_SECONDS", 0.02)
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.002)
    async with a_lab() as lab:
        lab.fail_with = UnreachableError("refused")
        for _ in range(3):
            with pytest.raises(UnreachableError):
                await lab.open()
        assert len(lab.dialled) == 1
        lab.fail_with = None
        later = Heard()
        lab.reactor.deadline(0.03, later.ended)
        await later.until("ended")
        assert lab.pool._entries == {}
        await lab.open()
        assert len(lab.dialled) == 2


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a bug")])
async def test_whatever_a_dial_raises_it_ends_its_callers_and_nobody_else(
    error: Exception,
) -> None:
    async with a_lab() as lab:
        await lab.open()
        lab.fail_with = error
        with pytest.raises(UnreachableError):
            await lab.open(replace(KEY, source=a_name("backend")))
        await lab.open()


async def test_a_dial_that_takes_too_long_is_given_up() -> None:
    async with a_lab(dial_seconds=0.02) as lab:
        lab.gate = trio.Event()
        with pytest.raises(PeerTimeoutError, match="NetworkPolicy is blocking HBONE port 15008"):
            await lab.open()


async def test_one_caller_that_is_cancelled_does_not_take_the_others_with_it() -> None:
    async with a_lab() as lab:
        lab.gate = trio.Event()
        opened = Heard()

        async def patient() -> None:
            opened.note("opened", await lab.open())

        scope = trio.CancelScope()

        async def hasty() -> None:
            with scope:
                await lab.open()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hasty)
            nursery.start_soon(patient)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            lab.gate.set()
        await opened.until("opened")
        assert scope.cancelled_caught
        assert len(lab.dialled) == 1


async def test_a_pool_that_closes_tells_the_waiting_and_leaves_nothing() -> None:
    before = open_descriptors()
    errors = []
    async with a_lab() as lab:
        lab.gate = trio.Event()

        async def one() -> None:
            try:
                await lab.open()
            except DrainError as error:
                errors.append(str(error))

        async with trio.open_nursery() as callers:
            callers.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            lab.pool.close()
        assert errors == ["pool draining"]
        lab.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert lab.peers == []
    assert open_descriptors() <= before + 1


async def test_who_meets_a_peer_that_is_leaving_is_led_to_another() -> None:
    async with a_lab() as lab:
        lab.leaving = 2
        tunnel, stream = await lab.open()
        assert tunnel is lab.peers[2].client
        assert all(pair.client.closed for pair in lab.peers[:2])
        end(tunnel, stream)


async def test_a_peer_that_is_always_leaving_is_not_dialled_for_ever() -> None:
    async with a_lab() as lab:
        lab.leaving = 99
        with pytest.raises(DrainError, match="pool draining"):
            await lab.open()
        assert len(lab.dialled) == attempt.LEAVING_MOST


async def test_a_peer_that_says_goaway_is_left_and_its_streams_go_on() -> None:
    async with a_lab() as lab:
        tunnel, stream = await lab.open()
        [peer] = lab.peers
        _, request = await peer.server_owner.until("on_request")
        peer.server.core.goaway(last=2**31 - 1)
        peer.server.flush_later()
        while lab.pool.get(KEY) is not None:
            await trio.testing.wait_all_tasks_blocked()
        assert (await lab.open())[0] is not tunnel
        assert not tunnel.closed
        peer.server.core.respond(request.stream, 200)
        peer.server.flush_later()
        await stream.owner.until("on_response")
        end(tunnel, stream)
        await peer.server_owner.until("on_closed")


async def test_a_tunnel_that_was_left_is_closed_with_the_pool() -> None:
    async with a_lab() as lab:
        tunnel, stream = await lab.open()
        lab.pool.on_goaway(tunnel)
        lab.pool.close()
        (error,) = await stream.owner.until("on_lost")
        assert isinstance(error, DrainError)


async def test_a_peer_that_takes_no_streams_is_not_dialled_for_ever() -> None:
    async with a_lab() as lab:
        lab.peer_settings = HboneSettings(max_concurrent_streams=0)
        with pytest.raises(LimitError, match=r"192.0.2.1:15008 takes no streams"):
            await lab.open()
        assert len(lab.dialled) == 1
        assert lab.peers[0].client.closed


async def test_a_tunnel_idle_for_long_is_closed_and_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.002)
    async with a_lab(idle_seconds=0.02) as lab:
        tunnel, stream = await lab.open()
        [peer] = lab.peers
        much_later = Heard()
        lab.reactor.deadline(0.08, much_later.ended)
        await much_later.until("ended")
        assert not tunnel.closed, "a stream keeps its tunnel"
        end(tunnel, stream)
        await peer.server_owner.until("on_closed")
        assert tunnel.closed
        assert (len(lab.pool), lab.pool._entries, lab.pool._watched) == (0, {}, set())


async def test_a_tunnel_that_nobody_used_in_the_end_is_closed_too(monkeypatch) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.002)
    async with a_lab(idle_seconds=0.02) as lab:

        class Nobody:
            """Has gone when the tunnel is there."""

            def on_tunnel(self, tunnel: Tunnel) -> None:
                pass

            on_no_tunnel = None

        lab.pool.request(KEY, a_permit(), Nobody())
        while not lab.peers:
            await trio.testing.wait_all_tasks_blocked()
        await lab.peers[0].server_owner.until("on_closed")


async def test_many_short_streams_run_one_idle_timer() -> None:
    async with a_lab() as lab:
        timers = len(lab.reactor._deadlines._queues.get(60.0, ()))
        for _ in range(100):
            end(*await lab.open())
        assert len(lab.reactor._deadlines._queues[60.0]) == timers + 1


async def test_a_draining_pool_opens_nothing_new_and_lets_the_old_finish() -> None:
    async with a_lab() as lab:
        tunnel, stream = await lab.open()
        lab.pool.drain()
        with pytest.raises(DrainError, match="pool draining"):
            await lab.open(replace(KEY, source=a_name("backend")))
        assert not tunnel.closed
        end(tunnel, stream)
        await lab.peers[0].server_owner.until("on_closed")


async def test_a_dial_that_ends_after_the_drain_began_leaves_no_tunnel() -> None:
    async with a_lab() as lab:
        lab.gate = trio.Event()

        async def one() -> None:
            with pytest.raises(DrainError):
                await lab.open()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            lab.pool.drain()
            lab.gate.set()
        assert lab.peers[0].client.closed


async def test_a_server_that_opens_a_stream_has_it_refused() -> None:
    async with a_lab() as lab:
        tunnel, stream = await lab.open()
        lab.pool.on_request(tunnel, RequestReceived(stream, []))
        assert tunnel.core.streams == {}


async def test_a_tunnel_that_is_congested_gets_another_beside_it_but_not_many(monkeypatch) -> None:
    monkeypatch.setattr(Tunnel, "blocked", property(lambda _: True))
    async with a_lab(streams_per_tunnel=100) as lab:
        for _ in range(module.SPREAD_MOST + 3):
            await lab.open()
            await trio.testing.wait_all_tasks_blocked()
        assert len(lab.dialled) == len(lab.pool) == module.SPREAD_MOST


async def test_without_a_permit_a_congested_tunnel_is_all_there_is(monkeypatch) -> None:
    async with a_lab() as lab:
        tunnel, _ = await lab.open()
        monkeypatch.setattr(Tunnel, "blocked", property(lambda _: True))
        assert lab.pool.get(KEY) is tunnel
        await trio.testing.wait_all_tasks_blocked()
        assert len(lab.dialled) == 1


async def test_a_tunnel_that_is_no_longer_current_is_left_by_new_streams_only() -> None:
    old: list[Tunnel] = []
    async with a_lab(is_current=lambda tunnel: tunnel not in old) as lab:
        tunnel, stream = await lab.open()
        old.append(tunnel)
        assert lab.pool.get(KEY) is None
        assert lab.pool.tunnels() == [tunnel]
        other, _ = await lab.open()
        assert other is not tunnel
        assert not tunnel.closed
        old.append(other)
        lab.pool.leave_old()
        assert len(lab.pool) == 0
        end(tunnel, stream)
        await lab.peers[0].server_owner.until("on_closed")
