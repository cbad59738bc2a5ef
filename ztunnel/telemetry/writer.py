"""Lines to standard output without ever stopping the event loop.

How it works: before the loop runs, and after it, a line is written at once. While `run` runs,
lines go into a bounded buffer that one trio task empties, in pieces that the kernel said it can
take: poll(2) promises that PIPE_BUF bytes fit into a pipe that is writable, so even a descriptor
that blocks does not block us (making it non-blocking would change it for every process that
shares it). A reader that is too slow costs lines, never connections: the newest are dropped,
counted, and reported as soon as there is room. The reference stops its data path instead.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable

import trio

LINES_MAX = 10_000  # as in the reference
PIECE_BYTES = 4096  # PIPE_BUF of Linux, pipe(7)
TURN_PIECES = 16  # pieces written before other tasks get their turn
GATHER_SECONDS = 0.05  # collect lines this long, so that a busy node wakes us 20 times a second
POLL_SECONDS = 0.05  # how often we look at a descriptor that epoll does not take
FAREWELL_SECONDS = 1.0  # how long a reader may hold up our end


class LineWriter:
    """Writes lines to the descriptor `fd`, in order."""

    def __init__(self, fd: int = 1, *, lines_max: int = LINES_MAX) -> None:
        self.fd = fd
        self.dropped = 0  # lines lost since the start, for a metric
        self.report: Callable[[int], str] | None = None  # makes the line about lost lines
        self._unreported = 0
        self._lines_max = lines_max
        self._lines: deque[str] = deque()
        self._rest = b""  # encoded, not yet written
        self._torn = False  # the last byte written was inside a line
        self._poll: select.poll | None = None
        self._wanted: trio.Event | None = None  # set when lines came; None while `run` does not run

    def write(self, line: str) -> None:
        """Take a line that ends in a newline."""
        if len(self._lines) >= self._lines_max:
            self.dropped += 1
            self._unreported += 1
            return
        self._lines.append(line)
        if self._wanted is None:
            self.flush(0 if self._unreported else FAREWELL_SECONDS)
        elif len(self._lines) == 1:
            self._wanted.set()

    async def run(self) -> None:
        """Write what comes until cancelled, then write the rest at once."""
        self._wanted = trio.Event()
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                await trio.sleep(GATHER_SECONDS)
                while self._lines or self._rest:
                    await self._write_some()
        finally:
            self._wanted = None
            self.flush(FAREWELL_SECONDS)

    def flush(self, patience_seconds: float) -> None:
        """Write everything, waiting at most that long each time the reader is full."""
        while self._lines or self._rest:
            if not self._is_writable(patience_seconds):
                self._give_up()
                return
            self._write_piece()

    async def _write_some(self) -> None:
        for _ in range(TURN_PIECES):
            if not (self._lines or self._rest):
                break
            if not self._is_writable(0):
                await self._wait_writable()
                return
            self._write_piece()
        await trio.lowlevel.checkpoint()

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self.fd)
        except OSError:  # a regular file, which epoll refuses and which is always writable
            await trio.sleep(POLL_SECONDS)

    def _is_writable(self, timeout_seconds: float) -> bool:
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.fd, select.POLLOUT)
        return bool(self._poll.poll(timeout_seconds * 1000))

    def _write_piece(self) -> None:
        if self._torn and not self._rest:  # the end of that line was given up
            self._rest = b"\n"
        while self._lines and len(self._rest) < PIECE_BYTES:
            self._rest += self._lines.popleft().encode()
        try:
            written = os.write(self.fd, self._rest[:PIECE_BYTES])
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more: nothing we could still tell anyone
            self._give_up()
            return
        self._torn = self._rest[written - 1 : written] != b"\n"
        self._rest = self._rest[written:]
        self._report_losses()

    def _report_losses(self) -> None:
        if self._unreported and self.report is not None and len(self._lines) < self._lines_max:
            self._lines.append(self.report(self._unreported))
            self._unreported = 0

    def _give_up(self) -> None:
        lost = len(self._lines) + self._rest.count(b"\n")
        self.dropped += lost
        self._unreported += lost
        self._lines.clear()
        self._rest = b""
