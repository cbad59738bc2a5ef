"""A small HTTP/1.1 server: one request, one answer, close. Over TCP, or over a UNIX socket.

The plugin sends a descriptor with the first bytes of its request (`cni.plugin.event`), so reading
is by `recvmsg`. h11 speaks the protocol.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

import h11
import structlog
import trio

from cni.agent.errors import SocketPathError
from ztunnel.linux.fdpass import RECEIVE_FLAGS

REQUEST_SECONDS = 5.0  # to send a request
ANSWER_SECONDS = 30.0
BODY_BYTES_MAX = 1 << 20
READ_BYTES = 65536
FDS_MAX = 4  # room for more than the one we want, so that surplus ones are seen, and closed
CONNECTIONS_MAX = 256
BACKLOG = 128
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"

log = structlog.get_logger(component="http")


@dataclass(slots=True)
class Request:
    """A request; who takes `fds` sets it to an empty list, the rest is closed."""

    method: str
    path: str
    query: str
    body: bytes
    fds: list[int] = field(default_factory=list)
    accept: str = ""  # the header of that name


@dataclass(frozen=True, slots=True)
class Response:
    """An answer."""

    status: int
    body: str = ""
    kind: str = TEXT


Handler = Callable[[Request], Awaitable[Response]]
Routes = Mapping[str, Handler]


async def serve(
    listener: trio.socket.SocketType, routes: Routes, *, body_bytes_max: int = BODY_BYTES_MAX
) -> None:
    """Serve whoever connects to a listening socket, until cancelled.

    `routes`: handlers by path; one that ends in `/*` is for all of that folder that have none.
    """
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)
    async with trio.open_nursery() as connections:
        while True:
            await limit.acquire_on_behalf_of(owner := object())
            try:
                sock, _ = await listener.accept()
            except OSError as exc:
                limit.release_on_behalf_of(owner)
                log.warning("cannot accept", error=str(exc))
                await trio.sleep(0.1)
                continue
            converse = partial(_converse, sock, routes, body_bytes_max)
            connections.start_soon(partial(_serve_one, sock, converse, limit, owner))


async def _serve_one(
    sock: trio.socket.SocketType,
    converse: Callable[[list[int]], Awaitable[None]],
    limit: trio.CapacityLimiter,
    owner: object,
) -> None:
    fds: list[int] = []
    try:
        await converse(fds)
    except (OSError, trio.TooSlowError, h11.RemoteProtocolError, h11.LocalProtocolError):
        pass  # whoever asked has left, or does not speak HTTP
    finally:
        for fd in fds:
            os.close(fd)
        sock.close()
        limit.release_on_behalf_of(owner)


async def _converse(
    sock: trio.socket.SocketType, routes: Routes, body_bytes_max: int, fds: list[int]
) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        with trio.fail_after(REQUEST_SECONDS):
            request = await _receive(sock, connection, body_bytes_max, fds)
    except h11.RemoteProtocolError as exc:
        await _send(sock, connection, Response(exc.error_status_hint or 400, f"{exc}\n"))
        return
    if request is None:
        text = f"the request is too long, {body_bytes_max} bytes are taken\n"
        await _send(sock, connection, Response(413, text))
        return
    with trio.fail_after(ANSWER_SECONDS):
        response = await _answer(routes, request)
        log.debug("request", method=request.method, path=request.path, status=int(response.status))
        await _send(sock, connection, response, is_head=request.method == "HEAD")


async def _answer(routes: Routes, request: Request) -> Response:
    folder = request.path.rpartition("/")[0]
    handler = routes.get(request.path) or routes.get(f"{folder}/*")
    if handler is None:
        await trio.lowlevel.checkpoint()
        return Response(404, f"not found; there is {', '.join(sorted(routes))}\n")
    return await handler(request)


async def _receive(
    sock: trio.socket.SocketType, connection: h11.Connection, body_bytes_max: int, fds: list[int]
) -> Request | None:
    """Receive a request; None if its body is too long. Descriptors go into `fds` as they come."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await _read(sock, fds))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > body_bytes_max:
                return None
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            path, _, query = head.target.decode("latin-1").partition("?")
            accept = dict(head.headers).get(b"accept", b"").decode("latin-1")
            method = head.method.decode("ascii")
            return Request(method, path, query, bytes(body), fds, accept)
        else:
            raise h11.RemoteProtocolError("no request")


async def _read(sock: trio.socket.SocketType, fds: list[int]) -> bytes:
    if sock.family != socket.AF_UNIX:
        return await sock.recv(READ_BYTES)
    space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
    data, control, _, _ = await sock.recvmsg(READ_BYTES, space, RECEIVE_FLAGS)
    for level, kind, payload in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            sent = array.array("i")
            sent.frombytes(payload[: len(payload) - len(payload) % sent.itemsize])
            fds.extend(sent)
    return data


async def _send(
    sock: trio.socket.SocketType,
    connection: h11.Connection,
    response: Response,
    *,
    is_head: bool = False,
) -> None:
    body = response.body.encode()
    headers = [
        ("content-type", response.kind),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    phrase = HTTPStatus(response.status).phrase.encode()  # all that istioctl shows of a refusal
    head = h11.Response(status_code=response.status, headers=headers, reason=phrase)
    data = connection.send(head) or b""
    if not is_head:
        data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    stream = trio.SocketStream(sock) if sock.family != socket.AF_UNIX else None
    if stream is not None:
        await stream.send_all(data)
    else:
        view = memoryview(data)
        while view:
            view = view[await sock.send(view) :]
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def listen_tcp(port: int, *, host: str = "::") -> trio.socket.SocketType:
    """Listen at a TCP port of an address; by default of both families (IPv4 if there is no other).

    Raises:
        SocketPathError: it cannot be done.
    """
    if host == "::":
        with suppress(OSError):
            return _listen_tcp(socket.AF_INET6, host, port)
        host = "0.0.0.0"  # noqa: S104 - as the reference
    try:
        return _listen_tcp(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)
    except OSError as exc:
        raise SocketPathError(f"cannot listen at port {port}: {exc}") from exc


def _listen_tcp(family: socket.AddressFamily, host: str, port: int) -> trio.socket.SocketType:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)
