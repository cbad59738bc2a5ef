"""The client against a real gRPC server on a real socket: short deadlines, no mocked clock."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from hpack import Encoder

from tests.support.certs import AUTHORITY, server_context
from tests.support.grpc_echo import EchoServer
from ztunnel.errors import CallError, LimitError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport import grpc as module, grpc_stream
from ztunnel.transport.grpc import GrpcClient
from ztunnel.transport.grpc_access import LOCAL, GrpcAccess
from ztunnel.wire.hbone.frames import (
    END_HEADERS,
    END_STREAM,
    FrameKind,
    pack_frame,
    pack_goaway,
    pack_reset,
    pack_settings,
)

ROOTS = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())
SECONDS = 10.0


@pytest.fixture
def server() -> Iterator[EchoServer]:
    echo = EchoServer("localhost")
    yield echo
    echo.stop()


def access(port: int, **more: object) -> GrpcAccess:
    return GrpcAccess(**{"server": ServerUrl("localhost", port), "root": ROOTS, **more})


async def echo(client: GrpcClient, message: bytes = b"hello") -> bytes:
    return await client.unary("/lab.Echo/Unary", message, seconds=SECONDS)


async def test_a_unary_call_brings_its_answer(server: EchoServer) -> None:
    client = GrpcClient(access(server.port, headers=(("x-lab", "1"),)))
    assert await echo(client) == b"hello"
    assert server.seen[0]["x-lab"] == "1"
    assert "authorization" not in server.seen[0]
    assert "clusterid" not in server.seen[0]


async def test_a_refused_call_says_how(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with pytest.raises(CallError, match="UNAUTHENTICATED: who are you") as caught:
        await echo(client, b"abort")
    assert caught.value.status == "UNAUTHENTICATED"


async def test_a_call_without_an_answer_ends_in_time(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with pytest.raises(CallError) as caught:
        await client.unary("/lab.Echo/Unary", b"wait", seconds=0.2)
    assert caught.value.status == "DEADLINE_EXCEEDED"


async def test_a_cancelled_call_leaves_at_once_and_the_next_one_works(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with trio.move_on_after(0.2) as scope:
        await echo(client, b"wait")
    assert scope.cancelled_caught
    assert await echo(client) == b"hello"


async def test_the_token_is_read_for_each_call_and_stripped(
    server: EchoServer, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    token = Source(SourceKind.FILE, str(path))
    client = GrpcClient(access(server.port, token=token, cluster_id="lab"))
    for text in ("one\n", " two "):
        path.write_text(text)
        await echo(client)
        async with client.stream("/lab.Echo/Stream") as stream:
            stream.send(b"quit")
            assert await stream.receive() is None
    shown = [seen["authorization"] for seen in server.seen]
    assert shown == ["Bearer one", "Bearer one", "Bearer two", "Bearer two"]
    assert server.seen[0]["clusterid"] == "lab"


@pytest.mark.parametrize("content", ["", "\n", "a\nb", None])
async def test_a_token_that_is_none_fails_the_call_and_not_more(
    content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    client = GrpcClient(access(1, token=Source(SourceKind.FILE, str(path))))
    with pytest.raises(CallError, match="token") as caught:
        async with client.stream("/lab.Echo/Stream"):
            pass
    assert caught.value.status == LOCAL


async def test_a_new_root_is_used_without_a_restart(server: EchoServer, tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(DevelopmentCa.create().roots_pem)
    client = GrpcClient(access(server.port, root=Source(SourceKind.FILE, str(path))))
    with pytest.raises(CallError) as caught:
        await echo(client)
    assert caught.value.status == "UNAVAILABLE"
    path.write_bytes(AUTHORITY.roots_pem)
    assert await echo(client) == b"hello"


@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nnot\n"])
async def test_without_a_root_nobody_is_trusted(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    if content is not None:
        path.write_text(content)
    client = GrpcClient(access(1, root=Source(SourceKind.FILE, str(path))))
    with pytest.raises(CallError, match="trust root") as caught:
        await echo(client)
    assert caught.value.status == LOCAL


@pytest.mark.parametrize(
    ("names", "alternative", "works"),
    [
        pytest.param(["localhost"], "istiod.test", True, id="its own name"),
        pytest.param(["istiod.test"], "istiod.test", True, id="the alternative name"),
        pytest.param(["istiod.test"], None, False, id="no alternative is configured"),
        pytest.param(["other.test"], "istiod.test", False, id="neither name"),
    ],
)
async def test_the_servers_name_must_be_its_own_or_the_alternative(
    names: list[str], alternative: str | None, works: bool
) -> None:
    server = EchoServer(*names)
    client = GrpcClient(access(server.port, alternative_hostname=alternative))
    try:
        if works:
            assert await echo(client) == b"hello"
        else:
            with pytest.raises(CallError, match="UNAVAILABLE"):
                await echo(client)
    finally:
        server.stop()


async def test_a_server_that_never_shakes_hands_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(CallError, match=f"no connection within .*localhost:{port}") as caught:
            await echo(GrpcClient(access(port)))
    assert caught.value.status == "UNAVAILABLE"


async def test_a_stream_carries_messages_both_ways_until_the_server_ends_it(
    server: EchoServer,
) -> None:
    with trio.fail_after(SECONDS):
        async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
            for number in range(20):
                stream.send(b"%d" % number)
            assert not stream.has_answered
            assert [await stream.receive() for _ in range(20)] == [b"%d" % i for i in range(20)]
            assert stream.has_answered
            stream.send(b"quit")
            assert await stream.receive() is None
            stream.send(b"too late, and no error")
            assert await stream.receive() is None


async def test_a_stream_that_is_broken_off_says_how(server: EchoServer) -> None:
    with trio.fail_after(SECONDS):
        async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
            stream.send(b"abort")
            with pytest.raises(CallError, match="enough") as caught:
                await stream.receive()
    assert caught.value.status == "RESOURCE_EXHAUSTED"


async def test_a_stream_to_nobody_says_so() -> None:
    with (
        trio.fail_after(SECONDS),
        pytest.raises(CallError, match=r"refused.*localhost:1") as caught,
    ):
        async with GrpcClient(access(1)).stream("/lab.Echo/Stream"):
            pass
    assert caught.value.status == "UNAVAILABLE"


async def test_large_messages_pass_one_after_the_other(server: EchoServer) -> None:
    messages = [bytes([number]) * 3 * 1024 * 1024 for number in range(4)]
    with trio.fail_after(SECONDS):
        async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
            for message in messages:
                stream.send(message)
            for message in messages:  # more than a window of them waits while nobody takes them
                assert await stream.receive() == message


async def test_a_server_that_restarts_breaks_the_stream_and_takes_the_next(
    server: EchoServer,
) -> None:
    client = GrpcClient(access(server.port))
    with trio.fail_after(SECONDS):
        async with client.stream("/lab.Echo/Stream") as stream:
            stream.send(b"1")
            assert await stream.receive() == b"1"
            await trio.to_thread.run_sync(server.stop)
            with pytest.raises(CallError) as caught:
                await stream.receive()
        assert caught.value.status in {"UNAVAILABLE", "CANCELLED"}
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await echo(client)
        again = EchoServer("localhost", port=server.port)
        try:
            assert await echo(client) == b"hello"
        finally:
            again.stop()


async def test_a_server_that_drains_serves_the_stream_to_the_end(server: EchoServer) -> None:
    async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
        stream.send(b"1")
        assert await stream.receive() == b"1"
        drained = server.drain(SECONDS)
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await echo(GrpcClient(access(server.port)))  # it takes no new ones
        stream.send(b"2")
        assert await stream.receive() == b"2"
        stream.send(b"quit")
        assert await stream.receive() is None
    assert await trio.to_thread.run_sync(drained.wait, SECONDS)


async def test_leaving_a_stream_tells_the_server(server: EchoServer) -> None:
    async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
        stream.send(b"1")
        assert await stream.receive() == b"1"
    assert await trio.to_thread.run_sync(server.has_ended.wait, SECONDS)


async def test_messages_to_a_server_that_takes_none_have_a_limit(
    server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_stream, "REQUESTS_QUEUED_MAX", 0)
    async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
        with pytest.raises(LimitError, match="requests are waiting for https://localhost"):
            stream.send(b"x")


@asynccontextmanager
async def a_scripted_server(*script: bytes | None) -> AsyncIterator[int]:
    """Serve one TLS connection by rote, whatever comes: bytes are sent, None ends the script."""
    context = server_context("localhost")
    context.set_alpn_protocols(["h2"])

    async def serve(plain: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            stream = trio.SSLStream(plain, context, server_side=True)
            await stream.receive_some()
            for each in script:
                if each is None:
                    await trio.aclose_forcefully(stream)
                    return
                await stream.send_all(each)
            while await stream.receive_some():
                pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


SETTINGS = pack_settings({})
OPENED = SETTINGS + pack_frame(
    FrameKind.HEADERS,
    END_HEADERS,
    1,
    Encoder().encode([(":status", "200"), ("content-type", "application/grpc")]),
)


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        pytest.param([SETTINGS, None], "UNAVAILABLE", "closed the|reset by peer", id="gone"),
        pytest.param([OPENED, b"\0" * 9 * 3000], "UNAVAILABLE", "HTTP/2", id="garbage"),
        pytest.param([b"HTTP/1.1 400 Bad\r\n\r\n"], "UNAVAILABLE", "HTTP/2", id="HTTP 1.1"),
        pytest.param([OPENED, pack_reset(1, 11)], "RESOURCE_EXHAUSTED", "code 11", id="reset"),
        pytest.param(
            [OPENED, pack_goaway(0, 2, b"bye"), None], "UNAVAILABLE", "code 2. bye", id="GOAWAY"
        ),
        pytest.param(
            [OPENED, pack_goaway(1, 0, b"restart"), None],
            "UNAVAILABLE",
            "goes away .code 0. restart",
            id="GOAWAY, then the end",
        ),
    ],
)
async def test_a_server_that_breaks_off_is_named_and_the_cause_too(
    script: list[bytes | None], status: str, text: str
) -> None:
    async with a_scripted_server(*script) as port:
        with pytest.raises(
            CallError, match=f"(?s)^{status}: .*({text}).*localhost:{port}"
        ) as caught:
            await GrpcClient(access(port)).unary("/lab.Echo/Unary", b"x", seconds=SECONDS)
    assert caught.value.status == status


async def test_an_answer_may_come_byte_by_byte() -> None:
    trailers = pack_frame(
        FrameKind.HEADERS, END_HEADERS | END_STREAM, 1, Encoder().encode([("grpc-status", "0")])
    )
    wire = OPENED + pack_frame(FrameKind.DATA, 0, 1, b"\0\0\0\0\5hello") + trailers
    async with a_scripted_server(*(bytes([byte]) for byte in wire)) as port:
        client = GrpcClient(access(port))
        assert await client.unary("/lab.Echo/Unary", b"x", seconds=SECONDS) == b"hello"


async def test_a_server_that_falls_silent_is_pinged_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_stream, "PING_SECONDS", 0.1)
    monkeypatch.setattr(grpc_stream, "PING_TIMEOUT_SECONDS", 0.1)
    async with a_scripted_server(OPENED) as port:
        with pytest.raises(CallError, match="UNAVAILABLE: no answer to a ping"):
            await GrpcClient(access(port)).unary("/lab.Echo/Unary", b"x", seconds=SECONDS)


async def test_a_server_that_answers_pings_may_be_silent_for_long(
    server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_stream, "PING_SECONDS", 0.05)
    async with GrpcClient(access(server.port)).stream("/lab.Echo/Stream") as stream:
        with trio.move_on_after(0.5) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        stream.send(b"still here")
        assert await stream.receive() == b"still here"


async def test_calls_under_way_survive_a_new_root(server: EchoServer, tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(AUTHORITY.roots_pem)
    client = GrpcClient(access(server.port, root=Source(SourceKind.FILE, str(path))))
    answers: list[bytes] = []

    async def slow() -> None:
        answers.append(await echo(client, b"wait"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow)
        await trio.to_thread.run_sync(server.is_waiting.wait, SECONDS)
        path.write_bytes(AUTHORITY.roots_pem + DevelopmentCa.create().roots_pem)
        assert await echo(client) == b"hello"
        assert answers == []
        server.released.set()
    assert answers == [b"wait"]
