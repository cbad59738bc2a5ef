"""Queries over one TCP connection (RFC 7766): many at once, each answered when it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from ztunnel.dns.resolver import Pending, Transport
from ztunnel.telemetry.log import get
from ztunnel.wire import dns
from ztunnel.wire.dns import QUERY_BYTES_MAX, MessageSplitter

if TYPE_CHECKING:
    from trio.abc import Stream

    from ztunnel.dns.resolver import Resolver
    from ztunnel.model.network import Endpoint

log = get("dns")

IDLE_SECONDS = 5.0  # since the last whole query, or the last answer: single bytes do not count
SEND_SECONDS = 5.0
QUERIES_MAX = 100  # at once on one connection; then we stop reading until one is answered
POD_QUERIES_MAX = 1024  # at once on all connections of a pod; more are refused
CHUNK_BYTES = 16384


class StreamQueries:
    """One client's connection; `servers` are asked for what is not ours."""

    def __init__(self, stream: Stream, resolver: Resolver, servers: Sequence[Endpoint]) -> None:
        self._stream = stream
        self._resolver = resolver
        self._servers = servers
        self._places = trio.Semaphore(QUERIES_MAX, max_value=QUERIES_MAX)
        self._idle_since = trio.current_time()

    async def serve(self) -> None:
        """Answer until the client has finished or is idle, then finish and close."""
        answered, outbox = trio.open_memory_channel[bytes](0)
        try:
            async with self._stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, outbox)
                async with answered:
                    await self._read(answered, nursery)
        except* (trio.BrokenResourceError, trio.TooSlowError) as group:
            log.debug("DNS connection ended", error=str(group.exceptions[0]))

    async def _read(self, answered: trio.MemorySendChannel[bytes], nursery: trio.Nursery) -> None:
        splitter = MessageSplitter(QUERY_BYTES_MAX)
        while not splitter.is_too_long:
            with trio.move_on_at(self._idle_since + IDLE_SECONDS) as idle:
                chunk = await self._stream.receive_some(CHUNK_BYTES)
            if idle.cancelled_caught:
                if self._is_over():
                    return
            elif not chunk:
                return
            else:
                await self._take(bytes(chunk), splitter, answered, nursery)

    async def _take(
        self, chunk: bytes, splitter: MessageSplitter,
        answered: trio.MemorySendChannel[bytes], nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        for message in splitter.feed(chunk):
            self._idle_since = trio.current_time()
            outcome = self._resolver.ask(message, Transport.TCP)
            if isinstance(outcome, Pending):
                if self._resolver.stream_queries < POD_QUERIES_MAX:
                    await self._begin(outcome, answered, nursery)
                    continue
                outcome = self._resolver.refuse(outcome)
            if outcome is not None:
                await answered.send(outcome)

    def _is_over(self) -> bool:
        """Tell whether the client has been idle for too long; not while it waits for an answer."""
        now = trio.current_time()
        if self._places.value < QUERIES_MAX:
            self._idle_since = now
        return now >= self._idle_since + IDLE_SECONDS

    async def _begin(
        self, pending: Pending, answered: trio.MemorySendChannel[bytes], nursery: trio.Nursery
    ) -> None:
        await self._places.acquire()
        self._resolver.stream_queries += 1
        nursery.start_soon(self._finish, pending, answered.clone())

    async def _finish(self, pending: Pending, answered: trio.MemorySendChannel[bytes]) -> None:
        try:
            async with answered:
                await self._resolver.finish_stream(pending, self._servers, answered.send)
        finally:
            self._resolver.stream_queries -= 1
            self._places.release()
            self._idle_since = trio.current_time()

    async def _write(self, outbox: trio.MemoryReceiveChannel[bytes]) -> None:
        async with outbox:
            async for message in outbox:
                with trio.fail_after(SEND_SECONDS):
                    await self._stream.send_all(dns.framed(message))
