"""On-demand questions of a worker: the control process asks the control plane for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ztunnel.errors import LimitError, RouteError
from ztunnel.xds.demand import NAMES_MAX, WAIT_SECONDS

GRACE_SECONDS = 1.0  # the control process waits as long, and then tells what it was sent meanwhile


@dataclass(slots=True, eq=False)
class _Question:
    decided: trio.Event = field(default_factory=trio.Event)
    answer: str | None = None
    error: str = ""


class Questions:
    """Questions under way, by turn; `ask` sends one."""

    def __init__(self, ask: Callable[[int, str], None]) -> None:
        self._ask = ask
        self._open: dict[int, _Question] = {}
        self._turns = 0

    async def fetch(self, what: str) -> str:
        """Get an address into the store; returns what `xds.demand.Answer` calls the outcome.

        Raises:
            RouteError: the control plane did not answer in time, or the question was refused.
            LimitError: too many addresses are being waited for.
        """
        await trio.lowlevel.checkpoint()
        if len(self._open) >= NAMES_MAX:
            raise LimitError(f"{NAMES_MAX} addresses are being asked for already")
        self._turns += 1
        turn, question = self._turns, _Question()
        self._open[turn] = question
        try:
            self._ask(turn, what)
            with trio.move_on_after(WAIT_SECONDS + GRACE_SECONDS):
                await question.decided.wait()
        finally:
            self._open.pop(turn, None)
        if question.answer is None:
            raise RouteError(question.error or f"no answer from the control process about {what}")
        return question.answer

    def learned(self, turn: int, answer: str | None, error: str) -> None:
        """Take an answer; whoever gave up waiting does not mind."""
        question = self._open.pop(turn, None)
        if question is not None:
            question.answer, question.error = answer, error
            question.decided.set()
