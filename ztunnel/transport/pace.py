"""How background work takes turns with connections, on the one thread that runs both.

How to use it:

    with await pace.turn():     # nothing in here may await
        step()                  # of a fifth of a millisecond at the most

    await pace.through(steps)   # short ones, as many in each turn as fit into it

What takes long and nobody's connection waits for (applying what the control plane sent, dumps,
scrapes, TLS and certificates of our own calls) is done in turns. One at a time has the turn, in the
order in which they asked. While connections move bytes, a turn is short, and a rest comes before
the next: so a request that arrives in a turn waits once, for less than it takes anyway, and its
answer finds us resting. While they do not, turns are longer and there is no rest.

Nobody can be kept waiting for ever: the rest ends by the clock, and who had to wait for longer, as
connections had so much to do, has a longer turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Protocol, Self

import trio

BUSY_SECONDS: Final = 0.1  # connections that moved bytes within this time are at work
SHORT_SECONDS: Final = 0.000_12  # of a turn while they are: a step or two
LONG_SECONDS: Final = 0.001  # while they are not
# At the most: room for two requests and their answers. epoll counts milliseconds, so a rest in
# which nothing at all happens is one.
REST_SECONDS: Final = 0.000_5
REST_SHARE: Final = 4.0  # of the turn before it
LATE_SHARE: Final = 0.1  # of the time that connections took beyond the rest


class Activity(Protocol):
    """Who knows about connections: `transport.reactor.Reactor`."""

    served_at: float  # by `time.monotonic`: when one last had something to do


class Pace:
    """Gives turns. Without an `activity` to look at there are no connections."""

    def __init__(
        self, activity: Activity | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._activity = activity
        self._clock = clock
        self._queue = trio.Lock()  # which is fair
        self._began = self._until = -math.inf
        self._rested_at = -math.inf  # when the rest after the last turn is over

    async def turn(self) -> Self:
        """Wait for a turn, in which connections have had theirs; leave it before awaiting."""
        asked = self._clock()
        await self._queue.acquire()
        try:
            seconds = await self._rest(asked)
        except BaseException:
            self._queue.release()
            raise
        self._began = self._clock()
        self._until = self._began + seconds
        return self

    async def through(self, steps: Iterable[object]) -> None:
        """Draw `steps`, which are work, to their end."""
        left = iter(steps)
        is_done = False
        while not is_done:
            with await self.turn():
                is_done = not any(self.is_over for _ in left)

    @property
    def is_over(self) -> bool:
        """Whether the turn has lasted long enough."""
        return self._clock() >= self._until

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ended = self._clock()
        self._rested_at = ended + min(REST_SECONDS, REST_SHARE * (ended - self._began))
        self._queue.release()

    async def _rest(self, asked: float) -> float:
        """Rest if need be, and say for how many seconds the turn may last."""
        now = self._clock()
        if not self._is_busy(now):
            return LONG_SECONDS
        due = max(asked, self._rested_at)
        if due > now:
            await trio.sleep(due - now)
            now = self._clock()
        return min(LONG_SECONDS, max(SHORT_SECONDS, (now - due) * LATE_SHARE))

    def _is_busy(self, now: float) -> bool:
        return self._activity is not None and now - self._activity.served_at < BUSY_SECONDS
