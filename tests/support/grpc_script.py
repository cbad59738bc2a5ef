"""A gRPC server that does as it is told, down to the frames: `h2` behind real TLS."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio

from tests.support.certs import server_context
from ztunnel.wire.hbone.frames import pack_goaway

ANSWER = b"hello"
_FRAMED = bytes([0, 0, 0, 0, len(ANSWER)]) + ANSWER


class Script:
    """A server that does with each call what `on_call` says; it notes what it hears."""

    def __init__(self, on_call: Callable[[Peer, int], Awaitable[None]], streams: int = 100) -> None:
        self.on_call = on_call
        self.streams = streams
        self.connections = 0
        self.calls = 0
        self.events: list[h2.events.Event] = []
        self.heard: defaultdict[type[h2.events.Event], trio.Event] = defaultdict(trio.Event)
        self.farewells = trio.Event()  # any connection has ended

    async def serve(self, plain: trio.SocketStream) -> None:
        context = server_context("localhost")
        context.set_alpn_protocols(["h2"])
        self.connections += 1
        peer = Peer(trio.SSLStream(plain, context, server_side=True, https_compatible=True))
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await peer.begin(self.streams)
            async for data in peer.stream:
                for event in peer.h2.receive_data(data):
                    self.events.append(event)
                    self.heard[type(event)].set()
                    if isinstance(event, h2.events.StreamEnded):
                        self.calls += 1
                        await self.on_call(peer, event.stream_id)
                await peer.flush()
        self.farewells.set()
        await trio.aclose_forcefully(plain)


class Peer:
    """The client's end as the server sees it."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))

    async def begin(self, streams: int) -> None:
        self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: streams})
        await self.flush()

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def answer(self, stream_id: int) -> None:
        head = [(":status", "200"), ("content-type", "application/grpc")]
        self.h2.send_headers(stream_id, head)
        self.h2.send_data(stream_id, _FRAMED)
        self.h2.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)
        await self.flush()

    async def go_away(self, last: int) -> None:
        await self.stream.send_all(pack_goaway(last, 0, b""))  # h2 would hear nothing after it


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, script.serve, 0, host="127.0.0.1")
        listeners = await nursery.start(listen)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
