from __future__ import annotations

import trio
import trio.testing

from ztunnel.errors import DrainError, ZtunnelError
from ztunnel.model.network import Endpoint
from ztunnel.proxy.live import LiveConnections


class Call:
    """A connection in progress, which leaves the list when it is cut."""

    source = Endpoint.parse("192.0.2.1:40000")
    original = "192.0.2.10:80"
    protocol = "HBONE"
    actual: Endpoint | None = None

    def __init__(self, live: LiveConnections) -> None:
        self.live = live
        self.errors: list[ZtunnelError] = []

    def cut(self, error: ZtunnelError) -> None:
        self.errors.append(error)
        self.live.remove(self)  # type: ignore[arg-type]


def with_calls(inbound: int, outbound: int) -> tuple[LiveConnections, list[Call]]:
    live = LiveConnections()
    calls = [Call(live) for _ in range(inbound + outbound)]
    for call in calls[:inbound]:
        live.inbound[call] = None  # type: ignore[index]
    for call in calls[inbound:]:
        live.outbound[call] = None  # type: ignore[index]
    return live, calls


def test_both_directions_count() -> None:
    live, calls = with_calls(2, 1)
    assert len(live) == 3
    live.remove(calls[0])  # type: ignore[arg-type]
    live.remove(calls[0])  # type: ignore[arg-type]
    assert len(live) == 2


def test_cutting_all_tells_each_why() -> None:
    live, calls = with_calls(2, 2)
    reason = DrainError("pod removed")
    live.cut_all(reason)
    assert [call.errors for call in calls] == [[reason]] * 4
    assert len(live) == 0


async def test_waiting_ends_with_the_last_one_also_if_others_came_meanwhile() -> None:
    live, [first] = with_calls(1, 0)
    done = trio.Event()

    async def wait() -> None:
        await live.empty()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        live.remove(first)  # type: ignore[arg-type]
        late = Call(live)
        live.outbound[late] = None  # type: ignore[index]
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        live.remove(late)  # type: ignore[arg-type]
        await done.wait()


async def test_there_is_nothing_to_wait_for_when_there_are_none() -> None:
    with trio.fail_after(1):
        await LiveConnections().empty()
