"""A gRPC call under way, and the moving of its bytes (or those of several) over a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import trio

from ztunnel.errors import CallError, LimitError, TlsError, UnreachableError
from ztunnel.transport.secure_link import SecureLink
from ztunnel.wire.grpc import GrpcCall

REQUESTS_QUEUED_MAX: Final = 10_000  # acknowledgements and questions a server did not take yet
# istiod answers pings faster than every 15 s with a GOAWAY.
PING_SECONDS: Final = 30.0
PING_TIMEOUT_SECONDS: Final = 10.0


class Core(Protocol):
    """What decides which bytes go out and what those that came mean; see `wire.grpc.GrpcCall`."""

    is_over: bool

    @property
    def has_news(self) -> bool:
        """Whether somebody who waits should look."""

    @property
    def has_more_to_send(self) -> bool:
        """Whether `data_to_send` has something, or will when the server allows it."""

    def data_to_send(self) -> bytes:
        """Take the next bytes to send."""

    def receive(self, data: memoryview) -> None:
        """Digest bytes from the server."""

    def ping(self) -> None:
        """Ask for a sign of life."""

    def close(self, reason: str = "the server closed the connection") -> None:
        """Take note that the connection is gone."""

    def fail(self, status: str, text: str) -> None:
        """End with an error, unless it is over."""


class Carriage:
    """Moves bytes between a connection and a core."""

    def __init__(self, core: Core, link: SecureLink) -> None:
        self._core = core
        self._link = link
        self._work = trio.Event()  # something to send

    def wake(self) -> None:
        """Take note that there may be something to send."""
        self._work.set()

    async def carry(self, on_news: Callable[[], None]) -> None:
        """Move bytes until the core is over or this is cancelled; raises nothing of its own.

        `on_news` is called when the core has news, and at the end.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, on_news)
                await self._read(on_news)
                nursery.cancel_scope.cancel()
        finally:
            self._core.fail("CANCELLED", "the call was given up")
            on_news()

    async def _read(self, on_news: Callable[[], None]) -> None:
        core = self._core
        while not core.is_over:
            try:
                data = await self._hear()
            except (TlsError, UnreachableError) as error:
                core.close(str(error))
                return
            if data:
                core.receive(data)
            else:
                core.close()
            # Most reads bring a part of a message: to wake others for it would double their price.
            if core.has_news:
                on_news()
            if core.has_more_to_send:
                self._work.set()

    async def _hear(self) -> memoryview:
        """Wait for bytes, and ask for some after a while.

        Raises:
            UnreachableError: the connection broke, or nothing came.
            TlsError: the server broke TLS.
        """
        with trio.move_on_after(PING_SECONDS):
            return await self._link.receive()
        self._core.ping()
        self._work.set()
        with trio.move_on_after(PING_TIMEOUT_SECONDS):
            return await self._link.receive()
        raise UnreachableError(f"no answer to a ping within {PING_TIMEOUT_SECONDS:.0f} s")

    async def _write(self, on_news: Callable[[], None]) -> None:
        try:
            while True:
                self._work = trio.Event()
                while data := self._core.data_to_send():
                    await self._link.send(data)
                    await trio.lowlevel.checkpoint()
                await self._work.wait()
        except (TlsError, UnreachableError) as error:
            # The reader hears of it too, but perhaps later.
            self._core.close(str(error))
            on_news()


class MessageStream:
    """A call under way: whole messages out and in. One task receives; any may send."""

    def __init__(self, call: GrpcCall, carriage: Carriage, server: str) -> None:
        self._call = call
        self._carriage = carriage
        self._server = server
        self._has_answered = False
        self._news = trio.Event()  # a message, or the end

    @property
    def has_answered(self) -> bool:
        """Whether any message was received: before that, the call may not even have begun."""
        return self._has_answered

    def notice(self) -> None:
        """Take note that the call may have news."""
        if self._call.has_news:
            self._news.set()

    def send(self, *pieces: bytes) -> None:
        """Send a message some time soon; it is lost if the call ends first.

        A large one is best given in pieces: to join them would take long.

        Raises:
            LimitError: the server takes no messages.
        """
        if self._call.waiting >= REQUESTS_QUEUED_MAX:
            raise LimitError(f"{REQUESTS_QUEUED_MAX} requests are waiting for {self._server}")
        if not self._call.is_over:
            self._call.send(*pieces)
            self._carriage.wake()

    def finish(self) -> None:
        """Say that we send no more."""
        self._call.finish()
        self._carriage.wake()

    async def receive(self) -> bytes | bytearray | None:
        """Return the next message, None once the server has closed the stream without error.

        Raises:
            CallError: the call failed.
        """
        await trio.lowlevel.checkpoint()
        while (message := self._call.take()) is None:
            if self._call.failure is not None:
                raise named(self._call.failure, self._server)
            if self._call.is_over:
                return None
            self._news = trio.Event()
            await self._news.wait()
        if self._call.has_more_to_send:
            self._carriage.wake()  # the server may send more now
        self._has_answered = True
        return message

    async def receive_only(self) -> bytes | bytearray | None:
        """Return the answer of a unary call, None if there was none.

        Raises:
            CallError: the call failed.
        """
        answer = await self.receive()
        await self.receive()  # the status comes behind it
        return answer


def named(failure: CallError, server: str) -> CallError:
    """Add the server to an error of a call."""
    return CallError(f"{failure} ({server})", status=failure.status)
