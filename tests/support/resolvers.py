"""A resolver that does what a test says, by UDP and TCP on one loopback port."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import dns.message
import dns.rcode
import dns.rrset
import trio

from ztunnel.model.network import Endpoint
from ztunnel.wire.dns import MessageSplitter, framed

Script = Callable[[bytes, int], list[bytes]]
"""What to send for the n-th query; the first is 1."""


def answered(
    data: bytes, *lines: str, rcode: dns.rcode.Rcode = dns.rcode.NOERROR, flags: int = 0
) -> bytes:
    """Answer a query with records such as `example.org. 60 IN A 192.0.2.1`."""
    reply = dns.message.make_response(dns.message.from_wire(data))
    reply.set_rcode(rcode)
    reply.flags |= flags
    for line in lines:
        name, ttl, rdclass, rtype, text = line.split(maxsplit=4)
        reply.answer.append(dns.rrset.from_text(name, int(ttl), rdclass, rtype, text))
    return reply.to_wire()


def silence(data: bytes, number: int) -> list[bytes]:
    return []


def echo_nothing(data: bytes, number: int) -> list[bytes]:
    """Say that there is no such record."""
    return [answered(data)]


@dataclass
class ScriptedResolver:
    endpoint: Endpoint
    asked: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def a_resolver(script: Script, *, close_after: int = 0) -> AsyncIterator[ScriptedResolver]:
    """Serve; with `close_after`, a TCP connection is closed when so many queries came by it."""
    listener, datagrams = _sockets()
    resolver = ScriptedResolver(Endpoint.of(datagrams.getsockname()))

    async def serve_datagrams() -> None:
        with datagrams:
            while True:
                data, sender = await datagrams.recvfrom(4096)
                resolver.asked.append(data)
                for answer in script(data, len(resolver.asked)):
                    await datagrams.sendto(answer, sender)

    async def serve_stream(stream: trio.SocketStream) -> None:
        splitter, queries = MessageSplitter(), 0
        async with stream:
            async for chunk in stream:
                for data in splitter.feed(bytes(chunk)):
                    queries += 1
                    resolver.asked.append(data)
                    for answer in script(data, len(resolver.asked)):
                        await stream.send_all(framed(answer))
                if queries == close_after:
                    break

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_datagrams)
        nursery.start_soon(trio.serve_listeners, serve_stream, [listener])
        try:
            yield resolver
        finally:
            nursery.cancel_scope.cancel()


def _sockets() -> tuple[trio.SocketListener, trio.socket.SocketType]:
    """Find a port that is free in both transports."""
    while True:
        stream = socket.create_server(("127.0.0.1", 0))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagrams.bind(stream.getsockname())
        except OSError:
            stream.close()
            datagrams.close()
            continue
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(stream))
        return listener, trio.socket.from_stdlib_socket(datagrams)
