"""One end of the link: frames out of a queue and into it, until the other end is gone."""

from __future__ import annotations

import array
import math
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn

import trio

from ztunnel.errors import PeerError, UnreachableError
from ztunnel.linux.fdpass import RECEIVE_FLAGS, ancillary, descriptors
from ztunnel.workers.frames import BODY_BYTES_MAX, Frame, FrameReader, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.transport.sockets import Socket

READ_BYTES = 256 * 1024
FDS_PER_READ = 16
# Senders of much wait for this; what else is sent is small.
SHORT_QUEUE_BYTES = 256 * 1024
QUEUE_BYTES_MAX = 2 * BODY_BYTES_MAX
SEND_SECONDS = 30.0  # whoever reads nothing for so long is stuck, and its pods unserved


class Link:
    """Sends what is posted, and hands on what comes; `peer` is what errors call the other end."""

    def __init__(self, sock: Socket, peer: str, *, most: int = BODY_BYTES_MAX) -> None:
        """Take over a connected stream socket; bodies above `most` bytes are refused."""
        sock.setblocking(False)  # noqa: FBT003 - the name of the argument is the method's
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._peer = peer
        self._reader = FrameReader(most=most)
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self._queued_bytes = 0
        self._posted = trio.Event()
        self._shorter = trio.Event()
        self._is_closed = False

    def post(self, body: bytes, fd: int | None = None) -> None:
        """Send a message some time soon; a duplicate of `fd` goes along. Lost if we are closed."""
        if self._is_closed:
            return
        frame = pack(body, has_fd=fd is not None)
        self._queue.append((frame, None if fd is None else os.dup(fd)))
        self._queued_bytes += len(frame)
        self._posted.set()

    async def short(self) -> None:
        """Wait until little is left to be sent."""
        await trio.lowlevel.checkpoint()
        while self._queued_bytes > SHORT_QUEUE_BYTES and not self._is_closed:
            self._shorter = trio.Event()
            await self._shorter.wait()

    async def run(self, received: Callable[[Frame], Awaitable[None]]) -> NoReturn:
        """Send and receive; `received` owns the descriptor of what it gets.

        Raises:
            UnreachableError: the other end is gone, or reads nothing.
            PeerError: it sent what is no frame.
        """
        problem: PeerError | UnreachableError | None = None
        try:
            async with trio.open_nursery() as nursery:

                async def guarded(work: Callable[[], Awaitable[None]]) -> None:
                    nonlocal problem
                    try:
                        await work()
                    except (PeerError, UnreachableError) as error:
                        problem = error
                    except OSError as error:
                        problem = UnreachableError(f"{self._peer} is gone: {error}")
                    except trio.ClosedResourceError:
                        problem = UnreachableError(f"the link to {self._peer} was closed")
                    nursery.cancel_scope.cancel(reason="the link ends")

                nursery.start_soon(guarded, self._send)
                nursery.start_soon(guarded, lambda: self._receive(received))
        finally:
            self.close()
        assert problem is not None
        raise problem

    def close(self) -> None:
        """Let go of everything; more than once is fine."""
        self._is_closed = True
        self._sock.close()
        self._reader.close()
        while self._queue:
            _, fd = self._queue.popleft()
            if fd is not None:
                os.close(fd)
        self._shorter.set()

    async def _send(self) -> None:
        while True:
            while self._queue:
                if self._queued_bytes > QUEUE_BYTES_MAX:
                    raise UnreachableError(f"{self._peer} has not read {QUEUE_BYTES_MAX} bytes")
                frame, fd = self._queue.popleft()  # ours now: `close` lets go of the others
                try:
                    await self._send_one(frame, fd)
                finally:
                    if fd is not None:
                        os.close(fd)
                self._queued_bytes -= len(frame)
                if self._queued_bytes <= SHORT_QUEUE_BYTES:
                    self._shorter.set()
            self._posted = trio.Event()
            await self._posted.wait()

    async def _send_one(self, frame: bytes, fd: int | None) -> None:
        rest = memoryview(frame)
        control = ancillary(fd)
        with trio.CancelScope() as scope:
            while rest:
                scope.deadline = trio.current_time() + SEND_SECONDS
                sent = await self._sock.sendmsg([rest], control)
                rest, control = rest[sent:], []
            scope.deadline = math.inf
        if rest:
            raise UnreachableError(f"{self._peer} has read nothing for {SEND_SECONDS:g} s")

    async def _receive(self, received: Callable[[Frame], Awaitable[None]]) -> None:
        space = socket.CMSG_SPACE(FDS_PER_READ * array.array("i").itemsize)
        while True:
            data, control, flags, _ = await self._sock.recvmsg(READ_BYTES, space, RECEIVE_FLAGS)
            fds = [fd for entry in control for fd in descriptors(entry)]
            if flags & socket.MSG_CTRUNC:
                _close_all(fds)
                raise PeerError(f"{self._peer}: too few free descriptors here")
            frames = self._reader.receive(data, fds)
            if not data:
                raise UnreachableError(f"{self._peer} has closed the link")
            await self._hand_on(frames, received)

    @staticmethod
    async def _hand_on(
        frames: Sequence[Frame], received: Callable[[Frame], Awaitable[None]]
    ) -> None:
        waiting = deque(frames)
        try:
            while waiting:
                await received(waiting.popleft())
        finally:
            _close_all([frame.fd for frame in waiting if frame.fd is not None])


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
