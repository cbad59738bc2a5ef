"""A look inside trio, for whoever waits in its place.

trio has no public way to ask for these, so this reads and sets attributes of its runner. They are
tried once: where one is missing there is no `TrioLoop`, and nobody may wait in trio's place.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable
from typing import Any, Self

from trio._core import _run

Events = list[tuple[int, int]]
Wait = Callable[[float], Events]


class TrioLoop:
    """A running trio loop."""

    __slots__ = ("_io", "_runner", "events", "fd", "nothing_new")

    def __init__(self, runner: Any) -> None:  # noqa: ANN401 - private to trio
        self._runner = runner
        self._io = runner.io_manager
        self.fd: int = self._io._epoll.fileno()  # noqa: SLF001 - readable when trio has input
        self.events: Wait = self._io.get_events  # how trio itself waits, for so many seconds
        # What trio takes for a wake-up, and does nothing about: it only keeps it from idling.
        self.nothing_new: Events = [(self._io._force_wakeup_fd, select.EPOLLIN)]  # noqa: SLF001

    @classmethod
    def of(cls, runner: object) -> Self | None:
        """Look at a loop; None if it is not of the kind we know."""
        try:
            loop = cls(runner)
            _ = loop.has_work, loop.watches_idleness, loop.is_guest
            loop.wait_by(loop.events)
            loop.wait_by_itself()
        except AttributeError:
            return None
        return None if loop.is_guest else loop

    @classmethod
    def current(cls) -> Self | None:
        """Look at the loop that runs the caller."""
        return cls.of(getattr(_run.GLOBAL_RUN_CONTEXT, "runner", None))

    @property
    def has_work(self) -> bool:
        """Whether a task has become runnable."""
        return bool(self._runner.runq)

    @property
    def is_guest(self) -> bool:
        """Whether it is a guest of another loop: then it waits in a thread, where we may not."""
        return bool(self._runner.is_guest)

    @property
    def watches_idleness(self) -> bool:
        """Whether somebody is to be told when nothing happens for a while: tests do that."""
        runner = self._runner
        return bool(runner.waiting_for_idle) or runner.clock_autojump_threshold != math.inf

    def wait_by(self, wait: Wait) -> None:
        """From now on, have trio call `wait` where it would wait for events of its epoll set.

        `wait` gets the seconds that it may take and gives events of that set, and never raises.
        """
        self._runner.io_manager = _Waiting(self._io, wait)

    def wait_by_itself(self) -> None:
        """Undo `wait_by`."""
        self._runner.io_manager = self._io


class _Waiting:
    """trio's `io_manager` in all but how it waits."""

    def __init__(self, io_manager: Any, wait: Wait) -> None:  # noqa: ANN401 - private to trio
        self.get_events = wait
        self._io = io_manager

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever trio has there
        return getattr(self._io, name)
