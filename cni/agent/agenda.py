"""Which pod is looked at next: one look at a time for each, many pods side by side. Pure.

How it works: marking a pod means "look at it again"; why does not matter, because whoever looks
compares what is with what should be. A pod that is marked while it is being looked at gets another
look afterwards. A look that failed is repeated with growing delays; a new mark ends the wait, but
not the count of failures. Times are seconds of any clock that does not jump.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ztunnel.model.workload import PodUid

PARALLEL_MAX = 8  # looks at a time: each is mostly waiting for the kernel, the proxy or Kubernetes
FIRST_RETRY_SECONDS = 0.2
RETRY_SECONDS_MAX = 30.0
_DOUBLINGS_MAX = 16  # enough to reach the maximum; keeps the power small


@dataclass(slots=True)
class _Entry:
    due: float | None  # None: nothing to do
    is_running: bool = False
    failures: int = 0


class Agenda:
    """What is to be done about which pod, and when."""

    def __init__(self, rng: random.Random, *, parallel_max: int = PARALLEL_MAX) -> None:
        self._rng = rng
        self._parallel_max = parallel_max
        self._entries: dict[PodUid, _Entry] = {}
        self._running = 0

    def __len__(self) -> int:
        return len(self._entries)

    def mark(self, uid: PodUid, now: float) -> None:
        """Have a pod looked at soon."""
        entry = self._entries.setdefault(uid, _Entry(now))
        entry.due = now if entry.due is None else min(entry.due, now)

    def take(self, now: float) -> PodUid | None:
        """Take the pod that waits longest; None if none is due or too many are at it."""
        if self._running >= self._parallel_max:
            return None
        due = [(entry.due, uid) for uid, entry in self._waiting() if entry.due is not None]
        if not due or min(due)[0] > now:
            return None
        uid = min(due)[1]
        entry = self._entries[uid]
        entry.due, entry.is_running = None, True
        self._running += 1
        return uid

    def finish(self, uid: PodUid, now: float, *, succeeded: bool) -> None:
        """Note the end of a look; one that failed comes again."""
        entry = self._entries[uid]
        assert entry.is_running
        entry.is_running = False
        self._running -= 1
        if succeeded:
            entry.failures = 0
            if entry.due is None:
                del self._entries[uid]
            return
        if entry.due is None:
            entry.due = now + self._delay(entry.failures)
        entry.failures += 1

    def wake_at(self) -> float | None:
        """Say when `take` may have something; None if only a mark or an end changes that."""
        if self._running >= self._parallel_max:
            return None
        return min(
            (entry.due for _, entry in self._waiting() if entry.due is not None), default=None
        )

    def failures(self, uid: PodUid) -> int:
        """Say how many looks have failed in a row."""
        entry = self._entries.get(uid)
        return entry.failures if entry else 0

    def _waiting(self) -> list[tuple[PodUid, _Entry]]:
        return [(uid, entry) for uid, entry in self._entries.items() if not entry.is_running]

    def _delay(self, failures: int) -> float:
        delay = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures, _DOUBLINGS_MAX), RETRY_SECONDS_MAX)
        return delay * self._rng.uniform(0.5, 1.0)
