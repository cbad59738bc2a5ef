"""Connections to real TLS servers; what gRPC makes of them is in test_grpc.py."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from tests.support.certs import AUTHORITY, server_context
from ztunnel.errors import TlsError, UnreachableError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport.grpc_access import GrpcAccess
from ztunnel.transport.pace import Pace
from ztunnel.transport.secure_link import READ_BYTES, OtherNameError, SecureLink, open_link

SECONDS = 10.0


@asynccontextmanager
async def an_echo(
    *names: str, protocols: Sequence[str] = ("h2",), version: ssl.TLSVersion | None = None
) -> AsyncIterator[ServerUrl]:
    """Run a server with these names in its certificate that sends back what it hears."""
    context = server_context(*names)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    if version is not None:
        context.maximum_version = version

    async def serve(plain: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            stream = trio.SSLStream(plain, context, server_side=True)
            await stream.do_handshake()
            await stream.send_all(b"welcome")
            while data := await stream.receive_some():
                if data == b"close":
                    await stream.aclose()
                    return
                if data == b"cut":
                    return
                await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield ServerUrl("localhost", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def linked(
    server: ServerUrl, name: str = "localhost", *, pace: Pace | None = None, **options: bool
) -> SecureLink:
    roots = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())
    context = GrpcAccess(server=server, root=roots, **options).read_trust().context
    with trio.fail_after(SECONDS):
        return await open_link(server, context, name, pace or Pace())


async def heard(link: SecureLink, size: int) -> bytes:
    data = b""
    with trio.fail_after(SECONDS):
        while len(data) < size:
            data += await link.receive()
    return data


async def test_bytes_go_both_ways_from_the_first_on() -> None:
    async with an_echo("localhost") as server:
        link = await linked(server)
        assert await heard(link, 7) == b"welcome"
        message = bytes(range(256)) * (3 * READ_BYTES // 256)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.send, message)
            assert await heard(link, len(message)) == message
        link.close()
        link.close()


async def test_who_is_cancelled_while_others_have_the_turn_loses_nothing() -> None:
    pace = Pace()
    async with an_echo("localhost") as server:
        link = await linked(server, pace=pace)
        assert await heard(link, 7) == b"welcome"
        await link.send(b"hello")
        await trio.lowlevel.wait_readable(link._sock)
        with await pace.turn():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.receive)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert await heard(link, 5) == b"hello"
        link.close()


@pytest.mark.parametrize("word", [b"close", b"cut"])
async def test_the_end_is_empty(word: bytes) -> None:
    async with an_echo("localhost") as server:
        link = await linked(server)
        assert await heard(link, 7) == b"welcome"
        await link.send(word)
        with trio.fail_after(SECONDS):
            assert not await link.receive()
        link.close()


async def test_a_last_word_is_said_without_waiting() -> None:
    async with an_echo("localhost") as server:
        link = await linked(server)
        link.close(b"bye")
        with pytest.raises((UnreachableError, TlsError)):
            await link.send(b"more")


async def test_another_name_is_told_from_other_troubles() -> None:
    async with an_echo("istiod.test") as server:
        with pytest.raises(OtherNameError, match="localhost"):
            await linked(server)
        link = await linked(server, "istiod.test")
        link.close()


async def test_another_authority_is_not_trusted() -> None:
    async with an_echo("localhost") as server:
        roots = Source(SourceKind.LITERAL, DevelopmentCa.create().roots_pem.decode())
        context = GrpcAccess(server=server, root=roots).read_trust().context
        with pytest.raises(TlsError, match="certificate verify failed") as caught:
            await open_link(server, context, "localhost", Pace())
        assert not isinstance(caught.value, OtherNameError)


async def test_a_server_without_http2_is_refused() -> None:
    async with an_echo("localhost", protocols=()) as server:
        with pytest.raises(TlsError, match="does not speak HTTP/2"):
            await linked(server)


async def test_tls_12_is_refused_unless_it_is_allowed() -> None:
    async with an_echo("localhost", version=ssl.TLSVersion.TLSv1_2) as server:
        with pytest.raises(TlsError, match="handshake error"):
            await linked(server)
        link = await linked(server, tls12_enabled=True)
        assert await heard(link, 7) == b"welcome"
        link.close()


async def test_a_server_that_hangs_up_in_the_handshake_is_named_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = ServerUrl("127.0.0.1", listener.getsockname()[1])

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(10_000)
            connection.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, hang_up)
            with pytest.raises(TlsError, match="handshake error"):
                await linked(server)


@pytest.mark.parametrize(
    ("host", "cause"), [("localhost", "refused"), ("nowhere.invalid", "not known|resolution")]
)
async def test_a_server_that_is_not_there_says_why(host: str, cause: str) -> None:
    with pytest.raises(UnreachableError, match=cause):
        await linked(ServerUrl(host, 1))
