"""Calls to the control plane over gRPC (state-and-xds.md 2), for xDS and for the CA alike.

How to use it:

    client = GrpcClient(GrpcAccess.for_ca(config))
    answer = await client.unary(CREATE_CERTIFICATE_PATH, request_bytes, seconds=20.0)

    async with client.stream(ADS_PATH) as stream:
        stream.send(request_bytes)
        while (message := await stream.receive()) is not None:
            ...

Messages are bytes on both sides; nothing here knows protobuf. Every failure is a `CallError` that
names the server. Trust root and token are read for each call. A stream has a connection of its own,
and so has a unary call, unless `share` runs: then calls at about the same time share one.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.errors import CallError, LimitError, TlsError, UnreachableError
from ztunnel.transport.grpc_shared import SharedCalls
from ztunnel.transport.grpc_stream import Carriage, MessageStream, named
from ztunnel.transport.pace import Pace
from ztunnel.transport.secure_link import OtherNameError, SecureLink, open_link
from ztunnel.wire.grpc import GrpcCall, call_error

if TYPE_CHECKING:
    from ztunnel.transport.grpc_access import GrpcAccess, Trust

CONNECT_SECONDS: Final = 5.0  # as the reference


class GrpcClient:
    """Calls to one server."""

    def __init__(self, access: GrpcAccess, pace: Pace | None = None) -> None:
        self._access = access
        self._pace = pace or Pace()
        self._trust: Trust | None = None
        self._shared = SharedCalls(access.server, self._connect)

    async def share(self) -> None:
        """Let unary calls share connections until cancelled."""
        await self._shared.run()

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        """Make a call that must be over in `seconds`.

        Raises:
            CallError: it failed.
        """
        answer: bytes | bytearray | None = None
        with trio.move_on_after(seconds) as scope:
            if self._shared.is_running:
                answer = await self._call_shared(path, request, seconds=seconds)
            else:
                answer = await self._call_alone(path, request, seconds=seconds)
        if scope.cancelled_caught:
            raise self._error("DEADLINE_EXCEEDED", f"no answer within {seconds:g} s")
        if answer is None:
            raise self._error("INTERNAL", "an answer without a message")
        return bytes(answer)

    async def _call_shared(
        self, path: str, request: bytes, *, seconds: float
    ) -> bytes | bytearray | None:
        trust, metadata = await self._read_access()
        try:
            return await self._shared.call(path, request, trust, metadata, seconds=seconds)
        except LimitError:  # nothing was sent
            return await self._call_alone(path, request, seconds=seconds)

    async def _call_alone(
        self, path: str, request: bytes, *, seconds: float
    ) -> bytes | bytearray | None:
        answer: bytes | bytearray | None = None
        failure: CallError | None = None
        async with self.stream(path, seconds=seconds) as stream:
            try:
                stream.send(request)
                stream.finish()
                answer = await stream.receive_only()
            except CallError as error:  # which must not become a group of one
                failure = error
        if failure is not None:
            raise failure
        return answer

    @asynccontextmanager
    async def stream(
        self, path: str, *, seconds: float | None = None
    ) -> AsyncIterator[MessageStream]:
        """Make a bidirectional call that lives as long as the context.

        What the context lets out comes in a group, as from every nursery.

        Raises:
            CallError: the trust root or the token cannot be read, or there is no connection.
        """
        trust, metadata = await self._read_access()
        link = await self._connect(trust.context)
        server = self._access.server
        call = GrpcCall(server.target, path, metadata, seconds=seconds)
        carriage = Carriage(call, link)
        stream = MessageStream(call, carriage, str(server))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(carriage.carry, stream.notice)
                yield stream
                nursery.cancel_scope.cancel()
        finally:
            call.cancel()
            link.close(call.data_to_send())

    async def _read_access(self) -> tuple[Trust, tuple[tuple[str, str], ...]]:
        """Give whom to trust, and what to show, at this moment.

        Raises:
            CallError: it cannot be read.
        """
        access = self._access
        trust, metadata = await trio.to_thread.run_sync(
            lambda: (access.read_trust(self._trust), access.read_metadata()),
            limiter=trio.CapacityLimiter(1),  # slow names take the threads of the usual one
        )
        self._trust = trust
        return trust, metadata

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
        return named(call_error(status, text), str(self._access.server))
