"""A look inside trio, for whoever waits in its place.

trio has no public way to ask for these, so this reads attributes of its runner. They are tried
once: where one is missing there is no `TrioLoop`, and nobody may wait in trio's place.
"""

from __future__ import annotations

import math
from typing import Any, Self

from trio._core import _run


class TrioLoop:
    """A running trio loop."""

    __slots__ = ("_io", "_runner", "fd")

    def __init__(self, runner: Any) -> None:  # noqa: ANN401 - private to trio
        self._runner = runner
        self._io = runner.io_manager
        self.fd: int = self._io._epoll.fileno()  # noqa: SLF001 - readable when trio has input

    @classmethod
    def of(cls, runner: object) -> Self | None:
        """Look at a loop; None if it is not of the kind we know."""
        try:
            loop = cls(runner)
            _ = loop.has_work, loop.watches_idleness
            loop.wake()
        except AttributeError:
            return None
        return loop

    @classmethod
    def current(cls) -> Self | None:
        """Look at the loop that runs the caller."""
        return cls.of(getattr(_run.GLOBAL_RUN_CONTEXT, "runner", None))

    @property
    def has_work(self) -> bool:
        """Whether a task has become runnable."""
        return bool(self._runner.runq)

    @property
    def watches_idleness(self) -> bool:
        """Whether somebody is to be told when nothing happens for a while: tests do that."""
        runner = self._runner
        return bool(runner.waiting_for_idle) or runner.clock_autojump_threshold != math.inf

    def wake(self) -> None:
        """Make trio's next wait return at once."""
        self._io.force_wakeup()
