"""How the event loop fares: the lateness of a timer is the stall every connection felt."""

from __future__ import annotations

import trio

from ztunnel.telemetry.metrics import Metrics

EVERY_SECONDS = 0.25  # four times a second: 0.01 % of a core


async def watch_loop(metrics: Metrics) -> None:
    """Measure until cancelled."""
    while True:
        due = trio.current_time() + EVERY_SECONDS
        await trio.sleep_until(due)
        metrics.loop_lag_seconds.observe(max(0.0, trio.current_time() - due))
        metrics.tasks.set(trio.lowlevel.current_statistics().tasks_living)
