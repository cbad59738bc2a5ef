"""A running reactor, and two tunnels joined by a socket pair inside it."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from tests.support.certs import (
    a_certificate,
    a_client_context,
    a_name,
    a_server_context,
    an_established_pair,
)
from ztunnel.decide.authorize import Permit, authorize_outbound
from ztunnel.model.network import Endpoint
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.settings import HboneSettings

SECONDS = 10
CERTIFICATE = a_certificate(a_name("peer"))
CONTEXTS = {
    True: (a_client_context(), a_server_context()),
    False: (a_client_context(own_records=False), a_server_context(own_records=False)),
}
CONNECT = [(b":method", b"CONNECT"), (b":authority", b"192.0.2.1:80")]


def open_descriptors() -> int:
    """Count what is open, without what earlier tests have left to the garbage collector."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def open_sockets() -> int:
    """Count the sockets among them."""
    gc.collect()
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder is gone by now
            links.append(str(descriptor.readlink()))
    return sum(link.startswith("socket:") for link in links)


def a_permit(destination: str = "192.0.2.1:80") -> Permit:
    permit = authorize_outbound(Endpoint.parse(destination), illegal=())
    assert isinstance(permit, Permit)
    return permit


@asynccontextmanager
async def a_reactor() -> AsyncIterator[Reactor]:
    """A reactor that runs until the block ends; then nothing may be left in it."""
    reactor = Reactor()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        try:
            yield reactor
            assert len(reactor) == 0, "a socket was left in the reactor"
        finally:
            nursery.cancel_scope.cancel()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a real TCP connection over loopback, both non-blocking."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.settimeout(0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


class Heard:
    """Notes every call it gets, as (method, arguments): owner of anything, in a test."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.received = bytearray()
        self._more = trio.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith(("on_", "ended")):
            raise AttributeError(name)
        return lambda *arguments: self.note(name, *arguments)

    def note(self, name: str, *arguments: Any) -> None:
        if name == "on_data":
            for chunk in arguments[0].chunks:
                self.received += chunk
        self.calls.append((name, arguments))
        self._more.set()

    def heard(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for each, arguments in self.calls if each == name]

    async def until(self, name: str, count: int = 1) -> tuple[Any, ...]:
        """Wait for the `count`th call of a method; give its arguments."""
        with trio.fail_after(SECONDS):
            while len(self.heard(name)) < count:
                self._more = trio.Event()
                await self._more.wait()
        return self.heard(name)[count - 1]


def facts() -> TunnelFacts:
    return TunnelFacts(
        local=Endpoint.parse("127.0.0.1:1"),
        remote=Endpoint.parse("127.0.0.1:2"),
        peer=None,
        peer_not_after=0.0,
        certificate=CERTIFICATE,
        cipher="",
        version="",
    )


class TunnelPair:
    """A client's and a server's end of one tunnel."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        client_settings: HboneSettings,
        server_settings: HboneSettings,
        own_records: bool,
    ) -> None:
        established = an_established_pair(*CONTEXTS[own_records])
        socks = socket_pair()
        self.client_owner, self.server_owner = Heard(), Heard()
        ends = [
            Tunnel(
                reactor,
                sock,
                end.records,
                HboneConnection(client=owner is self.client_owner, settings=settings),
                owner,
                facts(),
            )
            for sock, end, owner, settings in zip(
                socks,
                established,
                (self.client_owner, self.server_owner),
                (client_settings, server_settings),
                strict=True,
            )
        ]
        self.client, self.server = ends
        for tunnel in ends:
            tunnel.start(b"")

    async def a_stream(self) -> tuple[Any, Any]:
        """Open a stream and answer it; give both ends."""
        owner = Heard()
        served = len(self.server_owner.heard("on_request")) + 1
        stream = self.client.open(CONNECT, owner)
        _, request = await self.server_owner.until("on_request", served)
        self.server.core.respond(request.stream, 200)
        self.server.flush_later()
        await owner.until("on_response")
        return stream, request.stream


@asynccontextmanager
async def a_tunnel_pair(
    reactor: Reactor,
    *,
    client_settings: HboneSettings | None = None,
    server_settings: HboneSettings | None = None,
    own_records: bool = True,
) -> AsyncIterator[TunnelPair]:
    """Two tunnels that have exchanged settings; closed at the end."""
    pair = TunnelPair(
        reactor,
        client_settings=client_settings or HboneSettings(),
        server_settings=server_settings or HboneSettings(),
        own_records=own_records,
    )
    await pair.client_owner.until("on_settings")
    await pair.server_owner.until("on_settings")
    try:
        yield pair
    finally:
        pair.client.close()
        pair.server.close()
