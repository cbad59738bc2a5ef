from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from cni.agent import http_server
from cni.agent.errors import SocketPathError
from cni.agent.http_server import Request, Response, listen_tcp, serve
from cni.agent.unix_socket import listen_unix
from tests.support.namespaces import open_descriptors


async def echo(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    kept, request.fds[:] = list(request.fds[:1]), request.fds[1:]
    text = f"{request.method} {request.query} {request.body.decode()} fds={len(kept)}"
    for fd in kept:
        os.close(fd)
    return Response(200, text)


@asynccontextmanager
async def serving(path: Path, *, body_bytes_max: int = 1 << 20) -> AsyncIterator[None]:
    with listen_unix(path, mode=0o600) as listener:
        async with trio.open_nursery() as nursery:
            serving = partial(serve, listener, {"/echo": echo}, body_bytes_max=body_bytes_max)
            nursery.start_soon(serving)
            yield
            nursery.cancel_scope.cancel()


async def ask(path: Path, data: bytes, *fds: int, finish: bool = True) -> bytes:
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(path))
        if fds:
            socket.send_fds(plain, [data], list(fds))
        else:
            plain.sendall(data)
        if finish:
            plain.shutdown(socket.SHUT_WR)
        sock = trio.socket.from_stdlib_socket(plain)
        answer = b""
        with trio.fail_after(10):
            while piece := await sock.recv(65536):
                answer += piece
        return answer


POST = b"POST /echo?a=b HTTP/1.1\r\nHost: unix\r\nContent-Length: 5\r\n\r\nhello"


async def test_a_request_is_answered_and_the_connection_closed(tmp_path: Path) -> None:
    async with serving(tmp_path / "s"):
        answer = await ask(tmp_path / "s", POST)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b"POST a=b hello fds=0")


async def test_descriptors_come_with_the_request_and_surplus_ones_are_closed(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path / "s"):
        await ask(tmp_path / "s", POST)
        before = open_descriptors()
        for count in (1, 3):
            answer = await ask(tmp_path / "s", POST, *[0] * count)
            assert answer.endswith(b"fds=1")
        assert open_descriptors() == before


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n" + b"x" * 600, b"413"),
        (b"GET /echo HTTP/1.1\r\n" + b"a: b\r\n" * 20000, b"431"),
    ],
)
async def test_what_is_wrong_is_answered_too(tmp_path: Path, data: bytes, status: bytes) -> None:
    async with serving(tmp_path / "s", body_bytes_max=500):
        try:
            answer = await ask(tmp_path / "s", data)
        except (BrokenPipeError, ConnectionResetError):
            return  # it was cut off while it still sent, which is as good
    assert answer.split()[1] == status


async def test_who_leaves_or_says_nothing_does_not_stop_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.05)
    async with serving(tmp_path / "s"):
        assert await ask(tmp_path / "s", b"") == b""
        assert await ask(tmp_path / "s", b"POST /echo", finish=False) == b""
        assert await ask(tmp_path / "s", POST[:-2])
        assert b" 200 " in await ask(tmp_path / "s", POST)


async def test_a_folder_may_have_one_handler_for_all_its_pages(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "s", mode=0o600) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, {"/a/b": echo, "/a/*": echo})
            for path, status in ((b"/a/b", b"200"), (b"/a/c", b"200"), (b"/a/", b"200")):
                answer = await ask(tmp_path / "s", POST.replace(b"/echo", path))
                assert answer.split()[1] == status
            for path in (b"/a", b"/", b"/a/b/c"):
                answer = await ask(tmp_path / "s", POST.replace(b"/echo", path))
                assert answer.endswith(b"\r\n\r\nnot found; there is /a/*, /a/b\n")
            nursery.cancel_scope.cancel()


async def test_what_form_is_wanted_is_passed_on(tmp_path: Path) -> None:
    async def accepted(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(200, f"accept={request.accept}")

    with listen_unix(tmp_path / "s", mode=0o600) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, {"/": accepted})
            for header in (b"", b"Accept: text/plain, */*\r\n"):
                asked = b"GET / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n"
                answer = await ask(tmp_path / "s", asked)
                assert answer.endswith(b"accept=" + header[8:].strip())
            nursery.cancel_scope.cancel()


async def test_head_is_answered_without_the_text(tmp_path: Path) -> None:
    async with serving(tmp_path / "s"):
        answer = await ask(tmp_path / "s", b"HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: 12\r\n" in answer.lower()
    assert answer.endswith(b"\r\n\r\n")


async def test_over_tcp_one_address_may_be_served_alone() -> None:
    for host in ("127.0.0.1", "::1"):
        with listen_tcp(0, host=host) as listener:
            assert listener.getsockname()[0] == host


async def test_over_tcp_both_families_are_served() -> None:
    with listen_tcp(0) as listener:
        port = listener.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, {"/echo": echo})
            for host in ("127.0.0.1", "::1"):
                async with await trio.open_tcp_stream(host, port) as stream:
                    await stream.send_all(POST)
                    answer = b"".join([piece async for piece in stream])
                assert answer.endswith(b"fds=0")
            nursery.cancel_scope.cancel()
        with pytest.raises(SocketPathError, match=f"port {port}"):
            listen_tcp(port)
