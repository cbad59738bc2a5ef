"""Scripted ends of the link between a control process and its workers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import trio

from ztunnel.errors import UnreachableError
from ztunnel.transport.sockets import Socket, local_pair
from ztunnel.workers.frames import Frame
from ztunnel.workers.link import Link
from ztunnel.workers.messages import (
    Answer,
    Order,
    encode_answer,
    encode_order,
)

M = TypeVar("M")
SECONDS = 5.0


class Script:
    """Sends what a test says, and keeps what comes until the test asks for it."""

    def __init__(self, sock: Socket, decode: Callable[[bytes], Order | Answer]) -> None:
        self.link = Link(sock, "the peer")
        self.received: list[Order | Answer] = []
        self.fds: list[int] = []
        self._decode = decode
        self._more = trio.Event()

    def order(self, order: Order, fd: int | None = None) -> None:
        self.link.post(encode_order(order), fd)

    def answer(self, answer: Answer) -> None:
        self.link.post(encode_answer(answer))

    async def next(self, kind: type[M], *, seconds: float = SECONDS) -> M:
        """Take the first message of a kind, waiting for it."""
        with trio.fail_after(seconds):
            while True:
                for message in self.received:
                    if isinstance(message, kind):
                        self.received.remove(message)
                        return message
                self._more = trio.Event()
                await self._more.wait()

    async def run(self) -> None:
        """Send and receive until either end is closed."""
        try:
            await self.link.run(self._take)
        except* (UnreachableError, trio.ClosedResourceError):
            pass

    async def _take(self, frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        if frame.fd is not None:
            self.fds.append(frame.fd)
        self.received.append(self._decode(frame.body))
        self._more.set()


@asynccontextmanager
async def a_script(
    sock: Socket, decode: Callable[[bytes], Order | Answer]
) -> AsyncIterator[Script]:
    script = Script(sock, decode)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script.run)
        try:
            yield script
        finally:
            nursery.cancel_scope.cancel()


class FakeProcess:
    """Has the link of a process, prints to a pipe, and ends when it is told to."""

    pid = 4711

    def __init__(self) -> None:
        self.link, self.theirs = local_pair()
        self.output, self.prints = os.pipe2(os.O_NONBLOCK)
        self.ended = trio.Event()
        self.status = "exit status 0"

    async def wait(self) -> None:
        await self.ended.wait()

    def kill(self) -> None:
        if not self.ended.is_set():
            self.status = "killed by SIGKILL"
            self.end()

    def end(self) -> None:
        os.close(self.prints)
        self.ended.set()

    def read_now(self) -> bytes | None:
        with suppress(BlockingIOError):
            return os.read(self.output, 1000)
        return None

    async def read(self) -> bytes:
        while (data := self.read_now()) is None:
            await trio.lowlevel.wait_readable(self.output)
        await trio.lowlevel.checkpoint()
        return data

    def close(self) -> str:
        os.close(self.output)
        return self.status
