from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ztunnel.transport.pace import (
    BUSY_SECONDS,
    LATE_SHARE,
    LONG_SECONDS,
    REST_SECONDS,
    REST_SHARE,
    SHORT_SECONDS,
    Pace,
)

STEP_SECONDS = SHORT_SECONDS / 4


class Connections:
    """Whether connections are at work."""

    served_at = float("-inf")


class Lab:
    """A pace on a clock that stands still while somebody works, unless `work` moves it."""

    def __init__(self) -> None:
        self.connections = Connections()
        self.worked = 0.0
        self.pace = Pace(self.connections, clock=self.now)

    def now(self) -> float:
        return trio.current_time() + self.worked

    def work(self, seconds: float = STEP_SECONDS) -> None:
        self.worked += seconds

    async def a_turn(self) -> int:
        """Work for a turn; return how many steps that were."""
        steps = 0
        with await self.pace.turn() as turn:
            while not turn.is_over:
                self.work()
                steps += 1
        return steps


async def test_a_turn_is_short_while_connections_are_at_work_and_long_else(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()
    assert await lab.a_turn() == pytest.approx(LONG_SECONDS / STEP_SECONDS, abs=1)
    lab.connections.served_at = lab.now()
    assert await lab.a_turn() == pytest.approx(SHORT_SECONDS / STEP_SECONDS, abs=1)
    lab.work(BUSY_SECONDS)
    assert await lab.a_turn() == pytest.approx(LONG_SECONDS / STEP_SECONDS, abs=1)


async def test_connections_that_are_at_work_have_a_rest_between_two_turns(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()
    for is_busy in (True, False):
        lab.connections.served_at = lab.now() if is_busy else float("-inf")
        await lab.a_turn()
        ended = lab.now()
        await lab.a_turn()
        rested = lab.now() - ended - (SHORT_SECONDS if is_busy else LONG_SECONDS)
        assert (rested > 0.99 * REST_SHARE * SHORT_SECONDS) is is_busy


async def test_the_rest_after_a_short_step_is_shorter(autojump_clock: MockClock) -> None:
    lab = Lab()
    lab.connections.served_at = 1000.0
    with await lab.pace.turn():
        lab.work(STEP_SECONDS)
    ended = lab.now()
    await lab.pace.turn()
    assert lab.now() - ended == pytest.approx(REST_SHARE * STEP_SECONDS)


async def test_what_was_not_at_work_for_long_need_not_rest_first(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()
    await lab.a_turn()
    lab.work(1)
    lab.connections.served_at = before = lab.now()
    with await lab.pace.turn():
        assert lab.now() == before


async def test_sockets_are_looked_at_between_two_turns_whoever_takes_them(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    looks = 0
    seen: list[int] = []

    class Looks(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal looks
            looks += 1

    async def work() -> None:
        for _ in range(10):
            with await lab.pace.turn():
                seen.append(looks)

    trio.lowlevel.add_instrument(instrument := Looks())
    async with trio.open_nursery() as workers:
        workers.start_soon(work)
        workers.start_soon(work)
    trio.lowlevel.remove_instrument(instrument)
    assert len(set(seen)) == len(seen) == 20


@pytest.mark.parametrize("is_busy", [True, False])
async def test_turns_are_given_in_the_order_in_which_they_are_asked_for(
    autojump_clock: MockClock, nursery: trio.Nursery, is_busy: bool
) -> None:
    lab = Lab()
    lab.connections.served_at = 1000.0 if is_busy else float("-inf")
    taken: list[str] = []

    async def work(name: str) -> None:
        for _ in range(3):
            with await lab.pace.turn():
                taken.append(name)
                lab.work()

    with await lab.pace.turn():
        for name in "abc":
            nursery.start_soon(work, name)
            await wait_all_tasks_blocked()
        assert not taken
    await trio.sleep(1)
    assert taken == list("abcabcabc")


async def test_steps_are_done_to_their_end_as_many_in_a_turn_as_fit(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()
    lab.connections.served_at = 1000.0
    done = 0

    def steps() -> Iterator[None]:
        nonlocal done
        for _ in range(10):
            lab.work()
            done += 1
            yield

    began, each = lab.now(), round(SHORT_SECONDS / STEP_SECONDS)
    await lab.pace.through(steps())
    assert done == 10
    rests = (lab.now() - began - 10 * STEP_SECONDS) / (REST_SHARE * SHORT_SECONDS)
    assert rests == pytest.approx(10 // each, abs=1)


async def test_who_is_kept_waiting_by_busy_connections_has_a_longer_turn_but_not_without_limit(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    for late, wanted in (
        (0.0, SHORT_SECONDS),
        (2 * SHORT_SECONDS / LATE_SHARE, 2 * SHORT_SECONDS),
        (10.0, LONG_SECONDS),
    ):
        await lab.a_turn()
        lab.connections.served_at = lab.now() + late

        async def keep(late: float = late) -> None:
            await trio.sleep(REST_SECONDS / 2)  # while the other rests
            lab.work(late)

        nursery.start_soon(keep)
        assert await lab.a_turn() == pytest.approx(wanted / STEP_SECONDS, abs=1)


async def test_work_goes_on_however_busy_connections_are(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    steps = turns = 0
    began = lab.now()
    while steps < 100:
        lab.connections.served_at = lab.now() + 1  # always
        steps += await lab.a_turn()
        turns += 1
    assert turns <= 100
    assert lab.now() - began <= turns * (REST_SECONDS + SHORT_SECONDS + STEP_SECONDS) * 1.01


async def test_who_is_cancelled_while_it_rests_leaves_the_turn_to_others(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()
    await lab.a_turn()
    lab.connections.served_at = lab.now()
    with trio.move_on_after(REST_SECONDS / 2) as scope:
        await lab.pace.turn()
    assert scope.cancelled_caught
    with trio.fail_after(1):
        assert await lab.a_turn()


async def test_what_fails_in_its_turn_leaves_it() -> None:
    pace = Pace()
    with pytest.raises(RuntimeError), await pace.turn():
        raise RuntimeError
    with trio.fail_after(5):
        await pace.turn()
