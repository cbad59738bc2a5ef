"""One edge-triggered epoll set, driven by one trio task, that owns every established socket.

How it works: a socket is registered once for reading, writing and hang-up, edge-triggered, so
there is no further epoll call in its life. Each turn dispatches what the kernel reports, then the
handlers whose budget ran out in the turn before, then flushes each connection that has something to
send, once. Handlers are plain functions: they read, move what they may move and return, so nothing
can be cancelled half-way and no stream costs a task (architecture.md decision 3).

Deadlines are kept in one queue per duration: all waits of one kind are equally long, so a queue is
in order by itself and adding or dropping a deadline is O(1).
"""

from __future__ import annotations

import os
import select
from collections import deque
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = get("transport")

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
BROKEN = select.EPOLLERR
URGENT = select.EPOLLPRI
# What makes a short read mean nothing: more may lie behind it, and no edge will tell. A read also
# stops at a mark in the data (MSG_OOB), in front of it and behind it.
HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | URGENT
INTEREST = READABLE | WRITABLE | URGENT | select.EPOLLRDHUP | select.EPOLLET

EVENTS_PER_TURN = 512  # what performance.md 3 was measured with
TICK_SECONDS = 0.25  # how late a deadline may fire


class Handler(Protocol):
    """Something that owns one socket in the reactor."""

    def on_event(self, events: int) -> None:
        """React to `events` (epoll bits). Spurious calls are normal."""

    def fail(self, error: Exception) -> None:
        """Give up: `on_event` raised, which is a bug of ours. Must not raise."""


class Flushable(Protocol):
    """Something that gathers bytes during a turn and sends them at its end."""

    def flush(self) -> None:
        """Send what has gathered."""

    def fail(self, error: Exception) -> None:
        """Give up: `flush` raised, which is a bug of ours. Must not raise."""


class Deadline:
    """One pending call; `cancel` drops it."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the call; harmless after it has happened."""
        self.callback = None


class Reactor:
    """Edge-triggered epoll in one trio task."""

    __slots__ = (
        "_deadlines",
        "_dirty",
        "_epoll",
        "_fresh",
        "_handlers",
        "_soon",
        "_turning",
        "_unfinished",
        "_wake_fd",
    )

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._unfinished: dict[Handler, None] = {}  # each once, whoever asks how often
        self._soon: list[Callable[[], None]] = []
        self._dirty: list[Flushable] = []
        self._fresh: set[int] = set()
        self._deadlines: dict[float, deque[Deadline]] = {}
        self._turning = False
        # Edge-triggered and never read: each write is one edge, which is all we want of it.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, READABLE | select.EPOLLET)

    def __len__(self) -> int:
        return len(self._handlers)

    def register(self, sock: socket.socket, handler: Handler) -> None:
        """Own `sock`, which must be non-blocking, until `forget`."""
        fd = sock.fileno()
        self._handlers[fd] = handler
        self._fresh.add(fd)
        self._epoll.register(fd, INTEREST)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching `sock`; call it before closing the socket."""
        fd = sock.fileno()
        if self._handlers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def hand_over(self, sock: socket.socket, handler: Handler) -> None:
        """Give a watched socket to another handler.

        The kernel does not repeat an edge that the old handler has seen, be it data or the end
        behind the data. Arming anew makes it look again, so the new handler learns of both.
        """
        fd = sock.fileno()
        self._handlers[fd] = handler
        self._epoll.modify(fd, INTEREST)

    def again(self, handler: Handler) -> None:
        """Call `handler` next turn as if readable: its budget ran out, or data may be waiting."""
        self._unfinished[handler] = None
        if not self._turning:
            os.eventfd_write(self._wake_fd, 1)

    def flush_later(self, connection: Flushable) -> None:
        """Flush `connection` once at the end of this turn."""
        self._dirty.append(connection)
        if not self._turning:
            os.eventfd_write(self._wake_fd, 1)

    def deadline(self, seconds: float, callback: Callable[[], None]) -> Deadline:
        """Call `callback` `seconds` from now, at most `TICK_SECONDS` late."""
        entry = Deadline(trio.current_time() + seconds, callback)
        queue = self._deadlines.get(seconds)
        if queue is None:
            queue = self._deadlines[seconds] = deque()
        queue.append(entry)
        return entry

    def soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next turn: what must not happen in the middle of a handler."""
        self._soon.append(callback)
        if not self._turning:
            os.eventfd_write(self._wake_fd, 1)

    async def run(self) -> None:
        """Dispatch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            try:
                await self._dispatch()
            finally:
                # Others may end later than we and still say what they want: nobody is to be woken.
                self._turning = True
                self._epoll.close()
                os.close(self._wake_fd)

    async def _dispatch(self) -> None:
        fd = self._epoll.fileno()
        while True:
            if self._unfinished or self._soon or self._dirty:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)
            self._turn()

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            self._expire(trio.current_time())

    def _turn(self) -> None:
        self._turning = True
        again, self._unfinished = self._unfinished, {}
        soon, self._soon = self._soon, []
        handlers = self._handlers
        fresh = self._fresh
        fresh.clear()
        for fd, events in self._epoll.poll(0, EVENTS_PER_TURN):
            # An fd number that was closed and reused in this very turn: the event is the old one's.
            if fresh and fd in fresh:
                continue
            handler = handlers.get(fd)
            if handler is not None:
                if again and handler in again:
                    del again[handler]
                    events |= READABLE  # noqa: PLW2901 - one share of the turn, not two
                self._call(handler, events)
        for handler in again:
            self._call(handler, READABLE)
        for callback in soon:
            self._fire(callback)
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for connection in dirty:
                self._flush(connection)
        self._turning = False

    def _call(self, handler: Handler, events: int) -> None:
        try:
            handler.on_event(events)
        except Exception as error:  # the boundary of one connection: a bug ends it alone
            log.exception("connection handler failed", handler=type(handler).__name__)
            _give_up(handler, error)

    def _flush(self, connection: Flushable) -> None:
        try:
            connection.flush()
        except Exception as error:
            log.exception("connection flush failed", handler=type(connection).__name__)
            _give_up(connection, error)

    def _expire(self, now: float) -> None:
        # Callbacks set deadlines: those are for the next tick, and may be of a new duration.
        for queue in tuple(self._deadlines.values()):
            for _ in range(len(queue)):
                if queue[0].callback is not None and queue[0].when > now:
                    break
                self._fire(queue.popleft().callback)

    def _fire(self, callback: Callable[[], None] | None) -> None:
        if callback is None:
            return
        try:
            callback()
        except Exception:  # a bug in one connection must not end the loop of all
            log.exception("deadline failed")


def _give_up(broken: Handler | Flushable, error: Exception) -> None:
    """Tell a connection of a bug; if that fails as well, the others must not suffer."""
    try:
        broken.fail(error)
    except Exception:
        log.exception("connection could not be given up", handler=type(broken).__name__)
