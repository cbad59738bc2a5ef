"""What we read of trio's inside: the attributes are still there and mean what we think."""

from __future__ import annotations

import queue
import select
import socket
from collections.abc import Callable

import trio

from ztunnel.transport.trio_loop import TrioLoop


def the_loop() -> TrioLoop:
    loop = TrioLoop.current()
    assert loop is not None
    return loop


def has_input(loop: TrioLoop) -> bool:
    return bool(select.select([loop.fd], [], [], 0)[0])


def test_a_loop_of_another_kind_is_left_alone() -> None:
    assert TrioLoop.of(object()) is None
    assert TrioLoop.of(None) is None


def test_a_guest_of_another_loop_is_left_alone() -> None:
    todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
    found = []

    async def look() -> None:
        found.append(TrioLoop.current())

    trio.lowlevel.start_guest_run(
        look, run_sync_soon_threadsafe=todo.put, done_callback=lambda _: todo.put(None)
    )
    while (step := todo.get(timeout=10)) is not None:
        step()
    assert found == [None]


async def test_it_has_work_from_when_a_task_becomes_runnable_until_it_has_run() -> None:
    loop, event = the_loop(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(event.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not loop.has_work
        event.set()
        assert loop.has_work
    assert not loop.has_work


async def test_its_epoll_set_tells_of_what_a_task_waits_for() -> None:
    loop = the_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, ours)
            await trio.testing.wait_all_tasks_blocked()
            assert not has_input(loop)
            theirs.send(b"x")
            assert has_input(loop)


async def test_whoever_waits_in_its_place_is_asked_until_it_gives_the_place_back() -> None:
    loop, asked = the_loop(), []

    def wait(seconds: float) -> list[tuple[int, int]]:
        asked.append(seconds)
        return loop.events(seconds)

    loop.wait_by(wait)
    await trio.sleep(0.001)
    assert asked
    ours, theirs = socket.socketpair()
    with ours, theirs:  # all else goes on as before
        theirs.send(b"x")
        await trio.lowlevel.wait_readable(ours)
    loop.wait_by_itself()
    before = len(asked)
    await trio.sleep(0.001)
    assert len(asked) == before


async def test_nothing_new_keeps_it_from_idling_and_does_nothing_else() -> None:
    loop, left = the_loop(), 3

    def wait(seconds: float) -> list[tuple[int, int]]:
        nonlocal left
        left -= 1
        return loop.nothing_new if left > 0 else loop.events(seconds)

    loop.wait_by(wait)
    await trio.testing.wait_all_tasks_blocked()
    loop.wait_by_itself()
    assert left <= 0
