"""How a reactor waits: in trio's place, or as a task of it; either way everybody gets a turn."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.support.tunnels import Heard, a_reactor, socket_pair
from ztunnel.transport import reactor as module
from ztunnel.transport.reactor import READABLE, Reactor


class Reads(Heard):
    """Reads what comes, and does something else besides."""

    def __init__(self, sock: socket.socket, then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.sock = sock
        self.then = then

    def on_event(self, events: int) -> None:
        if events & READABLE:
            self.note("read", self.sock.recv(100))
            self.then()


@pytest.fixture
def two() -> list[tuple[socket.socket, socket.socket]]:
    return [socket_pair(), socket_pair()]


def close(two: list[tuple[socket.socket, socket.socket]]) -> None:
    for pair in two:
        for sock in pair:
            sock.close()


@pytest.fixture(params=["in trio's place", "as a task"])
async def waiting(request: pytest.FixtureRequest) -> None:
    """The two ways in which a reactor waits; a second one of the same run is always a task."""
    if request.param == "as a task":
        module._host.set(object())


async def test_a_socket_and_a_sleeping_task_both_get_their_turn(waiting, two) -> None:
    async with a_reactor() as reactor:
        handler = Reads(two[0][0])
        reactor.register(handler.sock, handler)
        with trio.fail_after(5):
            for _ in range(3):
                await trio.sleep(0.001)
                two[0][1].send(b"x")
                assert await handler.until("read") == (b"x",)
                handler.calls.clear()
        reactor.forget(handler.sock)
        close(two)


async def test_a_task_that_a_handler_wakes_runs_at_once(waiting, two) -> None:
    async with a_reactor() as reactor:
        woken = trio.Event()
        handler = Reads(two[0][0], woken.set)
        reactor.register(handler.sock, handler)
        # Nothing else will happen for a long time: only the handler can end the wait.
        two[0][1].send(b"x")
        with trio.fail_after(5):
            await woken.wait()
        reactor.forget(handler.sock)
        close(two)


async def test_what_another_thread_brings_gets_through(waiting) -> None:
    async with a_reactor():
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(len, "ab")) == 2


async def test_a_busy_handler_does_not_keep_tasks_from_running(waiting, two) -> None:
    async with a_reactor() as reactor:
        handler = Reads(two[0][0])
        handler.on_event = lambda _: reactor.again(handler)  # always has more to do
        reactor.register(handler.sock, handler)
        with trio.fail_after(5):
            await trio.sleep(0.01)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
        reactor.forget(handler.sock)
        handler.on_event = lambda _: None
        close(two)


async def test_a_busy_task_does_not_keep_sockets_from_being_served(waiting, two) -> None:
    async with a_reactor() as reactor:
        handler = Reads(two[0][0])
        reactor.register(handler.sock, handler)
        two[0][1].send(b"x")
        with trio.fail_after(5):
            while not handler.calls:
                await trio.lowlevel.checkpoint()
        reactor.forget(handler.sock)
        close(two)


async def test_it_knows_when_a_socket_last_had_something_and_trios_own_do_not_count(two) -> None:
    async with a_reactor() as reactor:
        handler = Reads(two[0][0])
        reactor.register(handler.sock, handler)
        await trio.testing.wait_all_tasks_blocked()
        before = reactor.served_at
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(len, "ab"))
        assert reactor.served_at == before
        asked = time.monotonic()
        two[0][1].send(b"x")
        with trio.fail_after(5):
            assert await handler.until("read") == (b"x",)
            while reactor.served_at < asked:
                await trio.lowlevel.checkpoint()
        reactor.forget(handler.sock)
        close(two)


async def test_a_second_reactor_of_the_same_run_works_beside_the_first(two) -> None:
    async with a_reactor() as first, a_reactor() as second:
        handlers = [Reads(two[0][0]), Reads(two[1][0])]
        first.register(handlers[0].sock, handlers[0])
        second.register(handlers[1].sock, handlers[1])
        with trio.fail_after(5):
            for (_, far), handler in zip(two, handlers, strict=True):
                far.send(b"x")
                assert await handler.until("read") == (b"x",)
        first.forget(handlers[0].sock)
        second.forget(handlers[1].sock)
        close(two)


async def test_a_reactor_that_cannot_go_on_says_so_instead_of_standing_still() -> None:
    reactor = Reactor()
    with pytest.RaisesGroup(
        pytest.RaisesExc(ValueError, match="closed epoll"), flatten_subgroups=True
    ):
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reactor.run)
                await trio.testing.wait_all_tasks_blocked()
                reactor._epoll.close()
                await trio.sleep_forever()
