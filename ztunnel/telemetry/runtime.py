"""How the event loop fares: how late timers fire, and how long connections were not looked at."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ztunnel.telemetry.metrics import Metrics

EVERY_SECONDS = 0.25  # four times a second: 0.01 % of a core


async def watch_loop(metrics: Metrics, take_longest_stall: Callable[[], float]) -> None:
    """Measure until cancelled.

    The lateness of our own timer is a sample; `take_longest_stall` gives the longest stall since it
    was last called, in seconds, so that none is missed.
    """
    while True:
        due = trio.current_time() + EVERY_SECONDS
        await trio.sleep_until(due)
        metrics.loop_lag_seconds.observe(max(0.0, trio.current_time() - due))
        metrics.longest_stall.observe(take_longest_stall())
        metrics.tasks.set(trio.lowlevel.current_statistics().tasks_living)
