"""Calls that are to happen later, unless somebody no longer wants them.

They are kept in one queue per duration: all waits of one kind are equally long, so a queue is in
order by itself and adding or dropping a deadline is O(1).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from collections.abc import Callable

log = get("transport")


class Deadline:
    """One pending call; `cancel` drops it."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the call; harmless after it has happened."""
        self.callback = None


class Deadlines:
    """All pending calls. Times are those of one clock that never goes back, in seconds."""

    __slots__ = ("_queues",)

    def __init__(self) -> None:
        self._queues: dict[float, deque[Deadline]] = {}

    def add(self, when: float, seconds: float, callback: Callable[[], None]) -> Deadline:
        """Have `callback` called at `when`, which is `seconds` from now."""
        entry = Deadline(when, callback)
        queue = self._queues.get(seconds)
        if queue is None:
            queue = self._queues[seconds] = deque()
        queue.append(entry)
        return entry

    def expire(self, now: float) -> None:
        """Make the calls that are due."""
        # Callbacks set deadlines: those are for the next time, and may be of a new duration.
        for queue in tuple(self._queues.values()):
            for _ in range(len(queue)):
                if queue[0].callback is not None and queue[0].when > now:
                    break
                fire(queue.popleft().callback)


def fire(callback: Callable[[], None] | None) -> None:
    """Make a call that was put off; a bug in one connection must not end the loop of all."""
    if callback is None:
        return
    try:
        callback()
    except Exception:
        log.exception("deadline failed")
