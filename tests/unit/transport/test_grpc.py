"""The client against a real gRPC server on a real socket: short deadlines, no mocked clock."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trio

from ztunnel.config import Config
from ztunnel.devmesh.ca_server import server_credentials
from ztunnel.errors import CallError, LimitError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport import grpc as module
from ztunnel.transport.grpc import LOCAL, GrpcAccess, GrpcClient

AUTHORITY = DevelopmentCa.create()
ROOTS = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())
SECONDS = 10.0


class EchoServer:
    """Echoes messages; `quit` ends a stream, `abort` breaks it, `wait` never answers."""

    def __init__(self, *names: str) -> None:
        self.seen: list[dict[str, str]] = []
        self.is_waiting = threading.Event()
        self.released = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        methods = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("lab.Echo", methods)]
        )
        credentials = server_credentials(AUTHORITY, names)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def stop(self) -> None:
        self.released.set()
        self._server.stop(None).wait(SECONDS)

    def _note(self, context: grpc.ServicerContext) -> None:
        self.seen.append({key: str(value) for key, value in context.invocation_metadata()})

    def _unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        if request == b"wait":
            self.is_waiting.set()
            self.released.wait(SECONDS)
        if request == b"abort":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
        return request

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        for request in requests:
            if request == b"quit":
                return
            if request == b"abort":
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
            yield request


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
    client.close()


async def test_a_refused_call_says_how(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with pytest.raises(CallError, match="UNAUTHENTICATED: who are you") as caught:
        await echo(client, b"abort")
    assert caught.value.status == "UNAUTHENTICATED"
    client.close()


async def test_a_call_without_an_answer_ends_in_time(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with pytest.raises(CallError) as caught:
        await client.unary("/lab.Echo/Unary", b"wait", seconds=0.2)
    assert caught.value.status == "DEADLINE_EXCEEDED"
    client.close()


async def test_a_cancelled_call_leaves_at_once_and_the_next_one_works(server: EchoServer) -> None:
    client = GrpcClient(access(server.port))
    with trio.move_on_after(0.2) as scope:
        await echo(client, b"wait")
    assert scope.cancelled_caught
    assert await echo(client) == b"hello"
    client.close()


async def test_the_token_is_read_for_each_call_and_stripped(
    server: EchoServer, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    token = Source(SourceKind.FILE, str(path))
    client = GrpcClient(access(server.port, token=token, cluster_id="lab"))
    for text in ("one\n", " two "):
        path.write_text(text)
        await echo(client)
    assert [seen["authorization"] for seen in server.seen] == ["Bearer one", "Bearer two"]
    assert server.seen[0]["clusterid"] == "lab"
    client.close()


@pytest.mark.parametrize("content", ["", "\n", "a\nb", None])
async def test_a_token_that_is_none_fails_the_call_and_not_more(
    content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    client = GrpcClient(access(1, token=Source(SourceKind.FILE, str(path))))
    with pytest.raises(CallError, match="token") as caught:
        await client.stream("/lab.Echo/Stream")
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
    client.close()


@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nnot\n"])
async def test_without_a_root_nobody_is_trusted(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    if content is not None:
        path.write_text(content)
    client = GrpcClient(access(1, root=Source(SourceKind.FILE, str(path))))
    with pytest.raises(CallError, match="trust root") as caught:
        await echo(client)
    assert caught.value.status == LOCAL


def test_the_roots_of_the_system_are_those_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(AUTHORITY.roots_pem)
    nowhere = ssl.get_default_verify_paths()._replace(cafile=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setattr(module, "SYSTEM_BUNDLES", ("/nonexistent/bundle", str(bundle)))
    system = access(1, root=Source(SourceKind.SYSTEM, "SYSTEM"))
    assert system.read_roots() == AUTHORITY.roots_pem
    bundle.unlink()
    with pytest.raises(CallError, match="no trust store"):
        system.read_roots()


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
        client.close()
        server.stop()


async def test_a_server_that_never_shakes_hands_can_be_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = GrpcClient(access(mute.getsockname()[1], alternative_hostname="istiod.test"))
        with trio.move_on_after(0.2) as scope:
            await client.stream("/lab.Echo/Stream")
    assert scope.cancelled_caught


async def test_a_stream_carries_messages_both_ways_until_the_server_ends_it(
    server: EchoServer,
) -> None:
    stream = await GrpcClient(access(server.port)).stream("/lab.Echo/Stream")
    with trio.fail_after(SECONDS):
        for number in range(20):
            stream.send(b"%d" % number)
        assert not stream.has_answered
        assert [await stream.receive() for _ in range(20)] == [b"%d" % i for i in range(20)]
        assert stream.has_answered
        stream.send(b"quit")
        assert await stream.receive() is None
    stream.close()


async def test_a_stream_that_is_broken_off_says_how(server: EchoServer) -> None:
    stream = await GrpcClient(access(server.port)).stream("/lab.Echo/Stream")
    stream.send(b"abort")
    with trio.fail_after(SECONDS), pytest.raises(CallError, match="enough") as caught:
        await stream.receive()
    assert caught.value.status == "RESOURCE_EXHAUSTED"
    stream.close()


async def test_a_stream_to_nobody_says_so() -> None:
    stream = await GrpcClient(access(1)).stream("/lab.Echo/Stream")
    with trio.fail_after(SECONDS), pytest.raises(CallError) as caught:
        await stream.receive()
    assert caught.value.status == "UNAVAILABLE"
    assert not stream.has_answered
    stream.close()


async def test_a_large_message_passes(server: EchoServer) -> None:
    stream = await GrpcClient(access(server.port)).stream("/lab.Echo/Stream")
    message = bytes(3 * 1024 * 1024)
    with trio.fail_after(SECONDS):
        stream.send(message)
        assert await stream.receive() == message
    stream.close()


def join_stream_threads() -> None:
    """Wait for the threads that move messages; one that does not end fails the test."""
    for thread in threading.enumerate():
        if thread.name == "grpc stream":
            thread.join(SECONDS)
            assert not thread.is_alive()


async def test_a_closed_stream_leaves_no_thread_behind_whoever_reads_it(
    server: EchoServer,
) -> None:
    client = GrpcClient(access(server.port))
    for is_read in (True, False):
        stream = await client.stream("/lab.Echo/Stream")
        for number in range(5):
            stream.send(b"%d" % number)
        if is_read:
            assert await stream.receive() == b"0"
        stream.close()
        stream.close()
    await trio.to_thread.run_sync(join_stream_threads)


def test_a_stream_that_outlives_the_loop_does_not_hold_up_the_process(server: EchoServer) -> None:
    async def forget() -> None:
        stream = await GrpcClient(access(server.port)).stream("/lab.Echo/Stream")
        for number in range(5):
            stream.send(b"%d" % number)
        await stream.receive()
        streams.append(stream)

    streams: list[module.MessageStream] = []
    trio.run(forget)
    streams[0].close()
    join_stream_threads()


async def test_messages_to_a_server_that_takes_none_have_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REQUESTS_QUEUED_MAX", 0)
    stream = await GrpcClient(access(1)).stream("/lab.Echo/Stream")
    with pytest.raises(LimitError, match="requests are waiting"):
        stream.send(b"x")
    stream.close()


def test_the_configuration_says_where_and_whom_to_trust() -> None:
    token = Source(SourceKind.LITERAL, "hush")
    config = Config(
        xds_address=ServerUrl("xds.test", 1),
        ca_address=ServerUrl("ca.test", 2),
        ca_root=ROOTS,
        token=token,
        xds_headers=(("a", "b"),),
        alternative_ca_hostname="alt",
    )
    xds, ca = GrpcAccess.for_xds(config), GrpcAccess.for_ca(config)
    assert (xds.server.host, ca.server.host) == ("xds.test", "ca.test")
    assert (xds.headers, ca.headers) == ((("a", "b"),), ())
    assert (xds.alternative_hostname, ca.alternative_hostname) == (None, "alt")
    assert xds.token is ca.token is token
    assert "hush" not in repr(xds)


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
    client.close()
