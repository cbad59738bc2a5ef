from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.support.tunnels import Heard, a_reactor, open_descriptors, socket_pair
from ztunnel.transport import reactor as module
from ztunnel.transport.reactor import HUNG_UP, READABLE, Reactor


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

    def fail(self, error: Exception) -> None:
        self.note("fail", error)


@pytest.fixture
def two() -> list[tuple[socket.socket, socket.socket]]:
    return [socket_pair(), socket_pair()]


def close(two: list[tuple[socket.socket, socket.socket]]) -> None:
    for pair in two:
        for sock in pair:
            sock.close()


async def test_what_comes_is_dispatched_to_the_handler_of_its_socket(two) -> None:
    async with a_reactor() as reactor:
        handlers = [Reads(ours) for ours, _ in two]
        for handler in handlers:
            reactor.register(handler.sock, handler)
        assert len(reactor) == 2
        two[1][1].send(b"second")
        assert await handlers[1].until("read") == (b"second",)
        assert handlers[0].calls == []
        for handler in handlers:
            reactor.forget(handler.sock)
        close(two)


async def test_a_number_reused_within_the_turn_does_not_get_the_old_sockets_event(two) -> None:
    async with a_reactor() as reactor:
        (one, far_one), (other, far_other) = two
        fresh_ours, fresh_far = socket_pair()
        newcomers: list[Heard] = []

        def replace(victim: socket.socket) -> None:
            """Close the other socket and put a new one in its place, in number and in time."""
            number = victim.fileno()
            if number < 0 or newcomers:
                return
            reactor.forget(victim)
            victim.close()
            os.dup2(fresh_ours.fileno(), number)
            newcomer = Reads(socket.socket(fileno=number))
            newcomer.on_event = lambda events: newcomer.note("event", events)
            newcomers.append(newcomer)
            reactor.register(newcomer.sock, newcomer)

        reactor.register(one, Reads(one, lambda: replace(other)))
        reactor.register(other, Reads(other, lambda: replace(one)))
        # Both have an event in the same turn, so whoever is second is gone when its turn comes.
        far_one.send(b"x")
        far_other.send(b"x")
        with trio.fail_after(5):
            while not newcomers:
                await trio.lowlevel.checkpoint()
        [newcomer] = newcomers
        await newcomer.until("event")
        fresh_far.send(b"for the new one")
        events = [(await newcomer.until("event", 2))[0], newcomer.heard("event")[0][0]]
        # The old event was "readable"; the new socket was only writable until it got data.
        assert not newcomer.heard("event")[0][0] & READABLE
        assert events[0] & READABLE
        for sock in (one, other, newcomer.sock):
            if sock.fileno() >= 0:
                reactor.forget(sock)
                sock.close()
        for sock in (far_one, far_other, fresh_ours, fresh_far):
            sock.close()


async def test_a_handler_that_fails_is_told_so_and_the_others_go_on(two) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    async with a_reactor() as reactor:
        bad, good = Reads(two[0][0], broken), Reads(two[1][0])
        for handler in (bad, good):
            reactor.register(handler.sock, handler)
        for _, far in two:
            far.send(b"x")
        (error,) = await bad.until("fail")
        assert str(error) == "a bug"
        await good.until("read")
        for handler in (bad, good):
            reactor.forget(handler.sock)
        close(two)


async def test_a_handler_that_cannot_even_give_up_does_not_stop_the_others(two) -> None:
    class Hopeless(Reads):
        def fail(self, error: Exception) -> None:
            super().fail(error)
            raise RuntimeError("a second bug")

        def flush(self) -> None:
            raise RuntimeError("a bug")

    def broken() -> None:
        raise RuntimeError("a bug")

    async with a_reactor() as reactor:
        bad, good = Hopeless(two[0][0], broken), Reads(two[1][0])
        for handler in (bad, good):
            reactor.register(handler.sock, handler)
        two[0][1].send(b"x")
        await bad.until("fail")
        reactor.flush_later(bad)
        await bad.until("fail", 2)
        two[1][1].send(b"x")
        await good.until("read")
        for handler in (bad, good):
            reactor.forget(handler.sock)
        close(two)


class Flushed(Heard):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        self.note("flush")
        if self.error:
            raise self.error

    def fail(self, error: Exception) -> None:
        self.note("fail", error)


async def test_a_task_can_ask_for_a_flush_and_a_failing_one_ends_alone() -> None:
    async with a_reactor() as reactor:
        await trio.testing.wait_all_tasks_blocked()
        bad, good = Flushed(ValueError("no")), Flushed()
        reactor.flush_later(bad)
        reactor.flush_later(good)
        await bad.until("fail")
        await good.until("flush")
        assert len(good.calls) == 1


async def test_a_handler_whose_budget_ran_out_is_called_again_without_an_event(two) -> None:
    async with a_reactor() as reactor:
        handler = Heard()
        handler.on_event = lambda events: handler.note("event", events)  # type: ignore[method-assign]
        await trio.testing.wait_all_tasks_blocked()
        reactor.again(handler)
        assert await handler.until("event") == (READABLE,)
    close(two)


async def test_a_handler_that_asks_again_in_each_turn_gets_one_share_of_each(two) -> None:
    async with a_reactor() as reactor:
        (ours, far), _ = two
        turns, calls = [], []

        class Busy:
            def on_event(self, events: int) -> None:
                calls.append(events)
                far.send(b"x")  # so that there is an event in the next turn as well
                reactor.again(self)

            def fail(self, error: Exception) -> None:
                raise error

        done = trio.Event()

        def turn() -> None:
            turns.append(1)
            if len(turns) < 20:
                reactor.soon(turn)
            else:
                reactor.forget(ours)
                done.set()

        busy = Busy()
        reactor.register(ours, busy)
        reactor.soon(turn)
        await done.wait()
        assert all(events & READABLE for events in calls[1:])
        assert len(calls) <= len(turns) + 1
        busy.on_event = calls.append  # type: ignore[method-assign]
        close(two)


async def test_a_new_handler_learns_of_data_and_of_the_end_that_the_old_one_saw(two) -> None:
    async with a_reactor() as reactor:
        ours, far = two[0]
        old, new = Heard(), Heard()
        new.on_event = lambda events: new.note("event", events)  # type: ignore[method-assign]

        def pass_on(events: int) -> None:
            if events & HUNG_UP:
                reactor.hand_over(ours, new)
                reactor.look_again(ours)

        old.on_event = pass_on  # type: ignore[method-assign]
        far.send(b"data")
        far.shutdown(socket.SHUT_WR)
        reactor.register(ours, old)
        (events,) = await new.until("event")
        assert events & READABLE
        assert events & select.EPOLLRDHUP
        reactor.forget(ours)
        close(two)


async def test_whoever_watches_input_hears_of_room_once_it_asks(two) -> None:
    async with a_reactor() as reactor:
        ours, far = two[0]
        handler = Heard()
        handler.on_event = lambda events: handler.note("event", events)  # type: ignore[method-assign]
        reactor.watch_input(ours, handler)
        far.send(b"data")
        (events,) = await handler.until("event")
        assert events & READABLE
        assert len(handler.calls) == 1  # and not that there was room before
        while True:
            try:
                ours.send(bytes(65_536))
            except BlockingIOError:
                break
        reactor.await_room(ours)
        handler.calls.clear()
        with trio.fail_after(5):
            while not any(events & select.EPOLLOUT for _, (events,) in handler.calls):
                far.recv(1 << 20)
                await trio.lowlevel.checkpoint()
        reactor.forget(ours)
        close(two)


async def test_deadlines_come_in_order_and_a_cancelled_one_does_not(monkeypatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.005)
    async with a_reactor() as reactor:
        heard = Heard()
        reactor.deadline(0.3, lambda: heard.note("late"))
        reactor.deadline(0.01, lambda: heard.note("early"))
        cancelled = reactor.deadline(0.01, lambda: heard.note("cancelled"))
        cancelled.cancel()
        await heard.until("late")
        assert [name for name, _ in heard.calls] == ["early", "late"]
        cancelled.cancel()


async def test_a_deadline_of_zero_that_renews_itself_does_not_stop_the_world(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with a_reactor() as reactor:
        rounds = []

        def again() -> None:
            rounds.append(trio.current_time())
            if len(rounds) < 3:
                reactor.deadline(0, again)

        reactor.deadline(0, again)
        await trio.sleep(10 * module.TICK_SECONDS)
        assert len(set(rounds)) == 3


async def test_what_is_said_to_a_reactor_that_has_ended_is_not_heard(two) -> None:
    before = open_descriptors()
    async with trio.open_nursery() as nursery:
        reactor = Reactor()
        nursery.start_soon(reactor.run)
        ours = two[0][0]
        reactor.register(ours, Reads(ours))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before
    # Its descriptors are gone, and their numbers may be somebody else's by now.
    reactor.flush_later(Flushed())
    reactor.again(Reads(ours))
    reactor.forget(ours)
    assert len(reactor) == 0
    close(two)


async def test_what_is_to_be_done_soon_happens_in_the_next_turn_and_may_fail(two) -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        await trio.testing.wait_all_tasks_blocked()

        def fails() -> None:
            reactor.soon(lambda: heard.note("later"))
            raise RuntimeError("a bug")

        reactor.soon(fails)
        reactor.soon(lambda: heard.note("sooner"))
        assert heard.calls == []
        await heard.until("later")
        assert [name for name, _ in heard.calls] == ["sooner", "later"]
    close(two)


async def test_a_task_that_keeps_the_loop_is_a_stall_and_waiting_for_the_kernel_is_none() -> None:
    async with a_reactor() as reactor:
        await trio.testing.wait_all_tasks_blocked()
        reactor.take_longest_stall()
        began = time.monotonic()
        await trio.sleep(0.1)
        waited = time.monotonic() - began
        assert reactor.take_longest_stall() < waited
        began = time.monotonic()
        while time.monotonic() < began + 0.1:
            pass
        kept = time.monotonic() - began
        await trio.sleep(0.01)
        assert reactor.take_longest_stall() >= kept
        assert reactor.take_longest_stall() < kept


async def test_a_handler_that_keeps_the_loop_is_a_stall(two) -> None:
    ours, theirs = two[0]
    kept: list[float] = []

    def keep() -> None:
        began = time.monotonic()
        while time.monotonic() < began + 0.05:
            pass
        kept.append(time.monotonic() - began)

    async with a_reactor() as reactor:
        handler = Reads(ours, keep)
        reactor.register(ours, handler)
        theirs.send(b"x")
        await handler.until("read")
        while not kept:
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert reactor.take_longest_stall() >= kept[0]
        reactor.forget(ours)
        close(two)
