"""Orders to one worker that are under way: who waits for which answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ztunnel.workers.messages import (
    Connected,
    Drain,
    Leave,
    Metered,
    Ping,
    Serve,
    ShowConnections,
    ShowMetrics,
    encode_order,
)

Answered = Serve | Leave | Ping | ShowMetrics | ShowConnections | Drain
Piece = Metered | Connected
GONE = "the worker is gone"


@dataclass(slots=True, eq=False)
class _Waiting:
    on_piece: Callable[[Piece], None] | None
    decided: trio.Event = field(default_factory=trio.Event)
    error: str | None = None


class Orders:
    """Numbers orders and matches answers; `post` sends an order with a descriptor or none."""

    def __init__(self, post: Callable[[bytes, int | None], None]) -> None:
        self._post = post
        self._turns = 0
        self._waiting: dict[int, _Waiting] = {}
        self._is_gone = False

    def turn(self) -> int:
        """Give the number of the next order."""
        self._turns += 1
        return self._turns

    async def carry_out(
        self,
        order: Answered,
        on_piece: Callable[[Piece], None] | None = None,
        *,
        fd: int | None = None,
    ) -> str | None:
        """Send an order and wait until it is carried out; return why it was not, or None."""
        if self._is_gone:
            await trio.lowlevel.checkpoint()
            return GONE
        waiting = self._waiting[order.turn] = _Waiting(on_piece)
        try:
            self._post(encode_order(order), fd)
            await waiting.decided.wait()
        finally:
            self._waiting.pop(order.turn, None)
        return waiting.error

    def done(self, turn: int, error: str | None) -> None:
        """Take the end of an answer; whoever gave up waiting does not mind."""
        waiting = self._waiting.get(turn)
        if waiting is not None:
            waiting.error = error
            waiting.decided.set()

    def piece(self, piece: Piece) -> None:
        """Take a part of an answer."""
        waiting = self._waiting.get(piece.turn)
        if waiting is not None and waiting.on_piece is not None:
            waiting.on_piece(piece)

    def end(self) -> None:
        """Tell all who wait, and all who still come, that no answer will come."""
        self._is_gone = True
        for turn in tuple(self._waiting):
            self.done(turn, GONE)
