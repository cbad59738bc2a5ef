"""One edge-triggered epoll set that owns every established socket.

How it works: a socket is registered once for reading, writing and hang-up, edge-triggered, so
there is no further epoll call in its life. Each turn dispatches what the kernel reports, then the
handlers whose budget ran out in the turn before, then flushes each connection that has something to
send, once. Handlers are plain functions: they read, move what they may move and return, so nothing
can be cancelled half-way and no stream costs a task (architecture.md decision 3).

Who waits: as a task of trio's, the reactor would pay for each wake-up with a walk through trio's
scheduler and three more system calls. So it waits in trio's place, for its own sockets and for
trio's, and lets trio go on when there is something for it (`_Host`). Where that is not possible it
is a task like any other, and only slower.
"""

from __future__ import annotations

import math
import os
import select
import time
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.telemetry.log import get
from ztunnel.transport.deadlines import Deadline, Deadlines, fire
from ztunnel.transport.trio_loop import TrioLoop

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from ztunnel.transport.trio_loop import Events

log = get("transport")

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
BROKEN = select.EPOLLERR
URGENT = select.EPOLLPRI
# What makes a short read mean nothing: more may lie behind it, and no edge will tell. A read also
# stops at a mark in the data (MSG_OOB), in front of it and behind it.
HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | URGENT
READABLE_OR_HUNG_UP = READABLE | HUNG_UP
INPUT = READABLE | URGENT | select.EPOLLRDHUP | select.EPOLLET
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


class Reactor:
    """Edge-triggered epoll in one trio task."""

    __slots__ = (
        "_deadlines",
        "_dirty",
        "_epoll",
        "_fresh",
        "_handlers",
        "_input_only",
        "_soon",
        "_turning",
        "_unfinished",
        "_wake_fd",
        "answered_at",
        "longest_stall",
        "served_at",
        "trio_fd",
        "trio_has_input",
    )

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._unfinished: dict[Handler, None] = {}  # each once, whoever asks how often
        self._soon: list[Callable[[], None]] = []
        self._dirty: list[Flushable] = []
        self._fresh: set[int] = set()
        self._input_only: set[int] = set()  # watched, but not for room
        self._deadlines = Deadlines()
        self._turning = False
        self.trio_fd = -1  # trio's own epoll set, while we wait in its place
        self.trio_has_input = False
        self.longest_stall = 0.0  # seconds between two questions to the kernel, waiting apart
        self.answered_at = math.inf  # when it last answered; infinite while another waits for it
        self.served_at = -math.inf  # when a socket of ours last had something, by `time.monotonic`
        # Edge-triggered and never read: each write is one edge, which is all we want of it.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, READABLE | select.EPOLLET)

    def __len__(self) -> int:
        return len(self._handlers)

    def register(self, sock: socket.socket, handler: Handler) -> None:
        """Own `sock`, which must be non-blocking, until `forget`.

        One that is watched already changes hands without a system call: whoever had it has used up
        every edge, or calls `look_again`.
        """
        fd = sock.fileno()
        is_new = fd not in self._handlers
        self._handlers[fd] = handler
        if is_new:
            self._fresh.add(fd)
            self._epoll.register(fd, INTEREST)

    def watch_input(self, sock: socket.socket, handler: Handler) -> None:
        """Own a new `sock` as `register` does, but say nothing of room before `await_room`.

        One that has just been connected has room, and to be told so would cost a turn.
        """
        fd = sock.fileno()
        self._handlers[fd] = handler
        self._fresh.add(fd)
        self._input_only.add(fd)
        self._epoll.register(fd, INPUT)

    def await_room(self, sock: socket.socket) -> None:
        """Say when the watched `sock`, which took no more, has room again."""
        if sock.fileno() in self._input_only:
            self.look_again(sock)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching `sock`; call it before closing the socket."""
        fd = sock.fileno()
        self._input_only.discard(fd)
        if self._handlers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def hand_over(self, sock: socket.socket, handler: Handler) -> None:
        """Give a watched socket to another handler; it learns of what happens from now on."""
        self._handlers[sock.fileno()] = handler

    def look_again(self, sock: socket.socket) -> None:
        """Have the kernel report the state of a watched socket as if it were new; else do nothing.

        It does not repeat an edge that a handler has seen, be it data or the end behind the data;
        whoever takes over from that handler has to learn of both.
        """
        fd = sock.fileno()
        if fd in self._handlers:
            self._input_only.discard(fd)
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
        return self._deadlines.add(trio.current_time() + seconds, seconds, callback)

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
        loop = TrioLoop.current()
        if loop is None or _host.get(None) is not None:
            await self._dispatch_as_task()
        else:
            await self._dispatch_as_host(loop)

    async def _dispatch_as_host(self, loop: TrioLoop) -> None:
        host = _Host(self, self._epoll, loop)
        place = _host.set(host)
        loop.wait_by(host.wait)
        try:
            await host.failed.wait()
            raise host.error
        finally:
            _host.reset(place)
            loop.wait_by_itself()

    async def _dispatch_as_task(self) -> None:
        fd = self._epoll.fileno()
        while True:
            if self.has_work:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)
            self.served_at = time.monotonic()
            self.turn(self._epoll.poll(0, EVENTS_PER_TURN))

    @property
    def has_work(self) -> bool:
        """Whether something is to be done without waiting for the kernel."""
        return bool(self._unfinished or self._soon or self._dirty)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            self._deadlines.expire(trio.current_time())

    def take_longest_stall(self) -> float:
        """Give the longest time in seconds that no socket was looked at, since the last call.

        As a task like any other the reactor does not know what trio does meanwhile: 0 then.
        """
        longest, self.longest_stall = self.longest_stall, 0.0
        return longest

    def turn(self, reported: list[tuple[int, int]]) -> None:
        """Dispatch what the kernel reported, then what was put off."""
        self._turning = True
        # Almost always empty, and then not worth new ones.
        again: dict[Handler, None] | None = None
        soon: Sequence[Callable[[], None]] = ()
        if self._unfinished:
            again, self._unfinished = self._unfinished, {}
        if self._soon:
            soon, self._soon = self._soon, []
        self._dispatch_events(reported, again)
        for handler in again or ():
            self._call(handler, READABLE)
        for callback in soon:
            fire(callback)
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for connection in dirty:
                self._flush(connection)
        self._turning = False

    def _dispatch_events(
        self, reported: list[tuple[int, int]], again: dict[Handler, None] | None
    ) -> None:
        handlers, fresh = self._handlers, self._fresh
        fresh.clear()
        for fd, events in reported:
            # An fd number that was closed and reused in this very turn: the event is the old one's.
            if fresh and fd in fresh:
                continue
            handler = handlers.get(fd)
            if handler is not None:
                if again and handler in again:
                    del again[handler]
                    events |= READABLE  # noqa: PLW2901 - one share of the turn, not two
                try:
                    handler.on_event(events)
                except Exception as error:  # as `_call`, without a call for each event
                    log.exception("connection handler failed", handler=type(handler).__name__)
                    _give_up(handler, error)
            elif fd == self.trio_fd:
                self.trio_has_input = True

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


def _give_up(broken: Handler | Flushable, error: Exception) -> None:
    """Tell a connection of a bug; if that fails as well, the others must not suffer."""
    try:
        broken.fail(error)
    except Exception:
        log.exception("connection could not be given up", handler=type(broken).__name__)


class _Host:
    """Waits in trio's place: for our sockets and for whatever trio waits for.

    As an ordinary task the reactor costs a walk through trio's scheduler and three system calls
    more for each wake-up: that was 40 % of the CPU of a lone request and its answer. trio calls
    `wait` when all its tasks have run, and is given what its own epoll set has, if anything.
    """

    def __init__(self, reactor: Reactor, epoll: select.epoll, loop: TrioLoop) -> None:
        self._reactor = reactor
        self._poll = epoll.poll
        self._loop = loop
        self.failed = trio.Event()
        self.error: Exception = AssertionError("the reactor failed without an error")
        reactor.trio_fd = loop.fd
        epoll.register(loop.fd, READABLE)

    def wait(self, timeout: float) -> Events:
        """Serve our sockets until trio has something to do, for at most `timeout` seconds."""
        try:
            return self._serve(timeout)
        except Exception as error:  # noqa: BLE001 - else it would end trio, and every task with it
            self.error = error
            self._loop.wait_by_itself()
            self.failed.set()
            return self._loop.events(0)

    def _serve(self, timeout: float) -> Events:
        reactor, loop, poll = self._reactor, self._loop, self._poll
        now = time.monotonic()
        left, until = timeout, now + timeout
        served = False
        while True:
            if now - reactor.answered_at > reactor.longest_stall:  # noqa: PLR1730 - each turn pays
                reactor.longest_stall = now - reactor.answered_at
            events = poll(0 if reactor.has_work else max(left, 0), EVENTS_PER_TURN)
            reactor.answered_at = time.monotonic()
            if events or reactor.has_work:
                served = True
                reactor.turn(events)
                if len(events) > reactor.trio_has_input:  # not only trio's
                    reactor.served_at = reactor.answered_at
            if reactor.trio_has_input:
                reactor.trio_has_input = False
                return loop.events(0)
            if loop.has_work:
                break
            now = time.monotonic()
            left = until - now
            if left <= 0:
                break
        return loop.nothing_new if served and loop.watches_idleness else []


# Only one can wait in trio's place; any further one of the same run is a task of it.
_host: trio.lowlevel.RunVar[_Host | None] = trio.lowlevel.RunVar("reactor host")
