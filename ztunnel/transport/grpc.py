"""Calls to the control plane over gRPC (state-and-xds.md 2), for xDS and for the CA alike.

How to use it:

    client = GrpcClient(GrpcAccess.for_ca(config))
    answer = await client.unary(CREATE_CERTIFICATE_PATH, request_bytes, seconds=20.0)

    async with client.stream(ADS_PATH) as stream:
        stream.send(request_bytes)
        while (message := await stream.receive()) is not None:
            ...

Messages are bytes on both sides; nothing here knows protobuf. Every failure is a `CallError` that
names the server. Each call has a connection of its own, so trust root, token and address are
always those of the moment: a stream lives for half an hour, and a certificate for many.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.errors import CallError, LimitError, TlsError, UnreachableError
from ztunnel.transport.pace import Pace
from ztunnel.transport.secure_link import OtherNameError, SecureLink, open_link
from ztunnel.wire.grpc import GrpcCall, call_error

if TYPE_CHECKING:
    from ztunnel.transport.grpc_access import GrpcAccess, Trust

CONNECT_SECONDS: Final = 5.0  # as the reference
REQUESTS_QUEUED_MAX: Final = 10_000  # acknowledgements and questions a server did not take yet
# istiod answers pings faster than every 15 s with a GOAWAY.
PING_SECONDS: Final = 30.0
PING_TIMEOUT_SECONDS: Final = 10.0


class MessageStream:
    """A call under way: whole messages out and in. One task receives; any may send."""

    def __init__(self, call: GrpcCall, link: SecureLink, server: str) -> None:
        self._call = call
        self._link = link
        self._server = server
        self._has_answered = False
        self._news = trio.Event()  # a message, or the end
        self._work = trio.Event()  # something to send

    @property
    def has_answered(self) -> bool:
        """Whether any message was received: before that, the call may not even have begun."""
        return self._has_answered

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
            self._work.set()

    def finish(self) -> None:
        """Say that we send no more."""
        self._call.finish()
        self._work.set()

    async def receive(self) -> bytes | bytearray | None:
        """Return the next message, None once the server has closed the stream without error.

        Raises:
            CallError: the call failed.
        """
        await trio.lowlevel.checkpoint()
        while (message := self._call.take()) is None:
            if self._call.failure is not None:
                raise _named(self._call.failure, self._server)
            if self._call.is_over:
                return None
            self._news = trio.Event()
            await self._news.wait()
        if self._call.has_more_to_send:
            self._work.set()  # the server may send more now
        self._has_answered = True
        return message

    async def carry(self) -> None:
        """Move bytes until the call is over or cancelled; raises nothing of its own."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._call.fail("CANCELLED", "the call was given up")
            self._news.set()

    async def _read(self) -> None:
        while not self._call.is_over:
            try:
                data = await self._hear()
            except (TlsError, UnreachableError) as error:
                self._call.close(str(error))
                return
            if data:
                self._call.receive(data)
            else:
                self._call.close()
            # Most reads bring a part of a message: to wake others for it would double their price.
            if self._call.has_news:
                self._news.set()
            if self._call.has_more_to_send:
                self._work.set()

    async def _hear(self) -> memoryview:
        """Wait for bytes, and ask for some after a while.

        Raises:
            UnreachableError: the connection broke, or nothing came.
            TlsError: the server broke TLS.
        """
        with trio.move_on_after(PING_SECONDS):
            return await self._link.receive()
        self._call.ping()
        self._work.set()
        with trio.move_on_after(PING_TIMEOUT_SECONDS):
            return await self._link.receive()
        raise UnreachableError(f"no answer to a ping within {PING_TIMEOUT_SECONDS:.0f} s")

    async def _write(self) -> None:
        try:
            while True:
                self._work = trio.Event()
                while data := self._call.data_to_send():
                    await self._link.send(data)
                    await trio.lowlevel.checkpoint()
                await self._work.wait()
        except (TlsError, UnreachableError) as error:
            # The reader hears of it too, but perhaps later.
            self._call.close(str(error))
            self._news.set()


class GrpcClient:
    """Calls to one server."""

    def __init__(self, access: GrpcAccess, pace: Pace | None = None) -> None:
        self._access = access
        self._pace = pace or Pace()
        self._trust: Trust | None = None

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        """Make a call that must be over in `seconds`.

        Raises:
            CallError: it failed.
        """
        answer: bytes | bytearray | None = None
        failure: CallError | None = None
        with trio.move_on_after(seconds) as scope:
            try:
                async with self.stream(path, seconds=seconds) as stream:
                    try:
                        stream.send(request)
                        stream.finish()
                        answer = await stream.receive()
                        await stream.receive()  # the status comes behind it
                    except CallError as error:  # which must not become a group of one
                        failure = error
            except CallError as error:
                failure = error
        if failure is None and scope.cancelled_caught:
            failure = self._error("DEADLINE_EXCEEDED", f"no answer within {seconds:g} s")
        elif failure is None and answer is None:
            failure = self._error("INTERNAL", "an answer without a message")
        if failure is not None:
            raise failure
        assert answer is not None
        return bytes(answer)

    @asynccontextmanager
    async def stream(
        self, path: str, *, seconds: float | None = None
    ) -> AsyncIterator[MessageStream]:
        """Make a bidirectional call that lives as long as the context.

        What the context lets out comes in a group, as from every nursery.

        Raises:
            CallError: the trust root or the token cannot be read, or there is no connection.
        """
        access = self._access
        trust, metadata = await trio.to_thread.run_sync(
            lambda: (access.read_trust(self._trust), access.read_metadata()),
            limiter=trio.CapacityLimiter(1),  # slow names take the threads of the usual one
        )
        self._trust = trust
        link = await self._connect(trust.context)
        call = GrpcCall(access.server.target, path, metadata, seconds=seconds)
        stream = MessageStream(call, link, str(access.server))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.carry)
                yield stream
                nursery.cancel_scope.cancel()
        finally:
            call.cancel()
            link.close(call.data_to_send())

    async def _connect(self, context: ssl.SSLContext) -> SecureLink:
        """Connect under the server's own name, else under the alternative one.

        Raises:
            CallError: there is no connection to a server that is to be trusted.
        """
        problem = f"no connection within {CONNECT_SECONDS:.0f} s"
        for name in self._access.names:
            try:
                with trio.move_on_after(CONNECT_SECONDS):
                    return await open_link(self._access.server, context, name, self._pace)
                break
            except OtherNameError as error:
                problem = str(error)
            except (TlsError, UnreachableError) as error:
                problem = str(error)
                break
        raise self._error("UNAVAILABLE", problem)

    def _error(self, status: str, text: str) -> CallError:
        return _named(call_error(status, text), str(self._access.server))


def _named(failure: CallError, server: str) -> CallError:
    """Add the server to an error of a call."""
    return CallError(f"{failure} ({server})", status=failure.status)
