"""Unary calls to one server over a connection that they share for a while.

A call that finds no connection has one made, and who comes meanwhile waits for the same one. It is
made in a task of its own, so that a caller who leaves takes nothing from the others. Trust root and
token are still those of each call's moment: one that has others gets a new connection, and so does
one that comes when the old is a minute old, because the server's name may stand for another by
then. The old one ends when its calls have, or when nobody has used it for a few seconds.

A server may close a connection at the moment when we begin a call on it. If it has answered
earlier calls there and has said nothing to this one, the call is made once more, on a new one.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.errors import CallError
from ztunnel.transport.grpc_stream import Carriage, MessageStream, named
from ztunnel.transport.secure_link import SecureLink
from ztunnel.wire.grpc import GrpcCall, call_error
from ztunnel.wire.grpc_connection import GrpcConnection

if TYPE_CHECKING:
    from ztunnel.model.settings import ServerUrl
    from ztunnel.transport.grpc_access import Trust

# A node that starts asks for all of its certificates within a second or two; renewals are hours
# apart, and to wait for one with a connection open would burden the server for nothing.
IDLE_SECONDS: Final = 5.0
AGE_SECONDS_MAX: Final = 60.0

Connect = Callable[[ssl.SSLContext], Awaitable[SecureLink]]
Metadata = tuple[tuple[str, str], ...]


class UnheardError(CallError):
    """A call failed that the server, as far as we know, never looked at."""


class _Connection:
    """One connection: on its way, in use, or over."""

    def __init__(self, server: ServerUrl, trust: Trust, metadata: Metadata) -> None:
        self.has_answered = False
        self._server = server
        self._trust = trust
        self._metadata = metadata
        self._old_at = trio.current_time() + AGE_SECONDS_MAX
        self._is_made = trio.Event()  # it is there, or never will be
        self._failure: CallError | None = None
        self._core = GrpcConnection()
        self._carriage: Carriage | None = None
        self._streams: dict[GrpcCall, MessageStream] = {}
        self._callers = 0  # who uses it or waits for it
        self._use = trio.CancelScope()  # its deadline is when it has been idle for long enough

    def suits(self, trust: Trust, metadata: Metadata) -> bool:
        """Whether a call may begin on it that trusts these roots and shows this token."""
        return (
            self._failure is None
            and self._core.takes_calls
            and not self._use.cancel_called
            and (self._trust.roots_pem, self._metadata) == (trust.roots_pem, metadata)
            and trio.current_time() < self._old_at
        )

    async def serve(self, connect: Connect) -> None:
        """Connect, and carry bytes until the connection is over or idle; raises nothing."""
        try:
            link = await connect(self._trust.context)
        except CallError as error:
            self._failure = error
            self._is_made.set()
            return
        except trio.Cancelled:
            self._failure = named(call_error("CANCELLED", "the client ends"), str(self._server))
            self._is_made.set()
            raise
        self._carriage = Carriage(self._core, link)
        self._is_made.set()
        try:
            with self._use:
                await self._carriage.carry(self._notice)
        finally:
            self._core.leave()
            link.close(self._core.data_to_send())

    async def call(self, path: str, request: bytes, *, seconds: float) -> bytes | bytearray | None:
        """Make a call as soon as there is a connection.

        Raises:
            UnheardError: it failed, and the server has not looked at it.
            CallError: it failed, or there is no connection.
            LimitError: the server takes no more calls here.
        """
        # At once, or it may be closed as idle while we wait.
        self._callers += 1
        self._use.deadline = math.inf
        try:
            await self._is_made.wait()
            return await self._call(path, request, seconds=seconds)
        finally:
            self._callers -= 1
            if not self._callers:
                self._use.deadline = trio.current_time() + IDLE_SECONDS

    async def _call(self, path: str, request: bytes, *, seconds: float) -> bytes | bytearray | None:
        if self._failure is not None:
            raise CallError(str(self._failure), status=self._failure.status) from self._failure
        assert self._carriage is not None
        call = self._core.open(self._server.target, path, self._metadata, seconds=seconds)
        stream = self._streams[call] = MessageStream(call, self._carriage, str(self._server))
        try:
            stream.send(request)
            stream.finish()
            answer = await stream.receive_only()
        except CallError as error:
            if call.is_unheard and error.status == "UNAVAILABLE":
                raise UnheardError(str(error), status=error.status) from error
            raise
        finally:
            del self._streams[call]
            self._core.release(call)
            if self._core.has_more_to_send:
                self._carriage.wake()  # the server hears that the call is given up
            self._notice()
        self.has_answered = True
        return answer

    def _notice(self) -> None:
        for stream in self._streams.values():
            stream.notice()
        if self._core.is_over:
            self._use.cancel()


class SharedCalls:
    """The connections of one client; while it `run`s, calls can be made."""

    def __init__(self, server: ServerUrl, connect: Connect) -> None:
        self._server = server
        self._connect = connect
        self._nursery: trio.Nursery | None = None
        self._newest: _Connection | None = None

    @property
    def is_running(self) -> bool:
        """Whether calls can be made."""
        return self._nursery is not None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep connections until cancelled; then calls that are under way fail."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = self._newest = None

    async def call(
        self, path: str, request: bytes, trust: Trust, metadata: Metadata, *, seconds: float
    ) -> bytes | bytearray | None:
        """Make a call; return its answer, None if there was none.

        Raises:
            CallError: it failed.
            LimitError: the server takes no more calls at once.
        """
        connection = self._suitable(trust, metadata)
        is_proven = connection.has_answered
        try:
            return await connection.call(path, request, seconds=seconds)
        except UnheardError:
            if not is_proven:
                raise
        return await self._suitable(trust, metadata).call(path, request, seconds=seconds)

    def _suitable(self, trust: Trust, metadata: Metadata) -> _Connection:
        """Give the newest connection if it will do, else a new one.

        Raises:
            CallError: there will be none any more.
        """
        if self._newest is not None and self._newest.suits(trust, metadata):
            return self._newest
        if self._nursery is None or self._nursery.cancel_scope.cancel_called:
            raise named(call_error("CANCELLED", "the client ends"), str(self._server))
        self._newest = _Connection(self._server, trust, metadata)
        self._nursery.start_soon(self._newest.serve, self._connect)
        return self._newest
