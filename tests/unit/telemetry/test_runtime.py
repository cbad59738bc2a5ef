from __future__ import annotations

import trio
import trio.testing
from trio.testing import MockClock

from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.runtime import EVERY_SECONDS, watch_loop


async def test_a_stall_is_seen_in_the_lateness_of_the_next_timer(mock_clock: MockClock) -> None:
    metrics = Metrics()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_loop, metrics, lambda: 0.2)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(EVERY_SECONDS + 0.3)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sum(metrics.loop_lag_seconds.counts) == 1
    assert 0.29 < metrics.loop_lag_seconds.total < 0.31
    assert metrics.longest_stall.take() == 0.2
    assert metrics.tasks.value > 0


async def test_a_loop_at_ease_is_never_late(autojump_clock: MockClock) -> None:
    metrics = Metrics()
    with trio.move_on_after(10 * EVERY_SECONDS + 0.01):
        await watch_loop(metrics, lambda: 0.0)
    assert sum(metrics.loop_lag_seconds.counts) == 10
    assert metrics.loop_lag_seconds.total == 0
