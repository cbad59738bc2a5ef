"""Requests to the Kubernetes API: HTTP/1.1 over TLS, one connection each.

A connection per request is all a node agent needs: two watches that stay open, a list now and
then, and one patch for each pod that is enrolled. Token and roots are read each time, because the
kubelet rotates them. h11 speaks the protocol, so nothing here waits but trio.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import h11
import msgspec
import trio

from cni.agent.errors import KubeError

ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_SECONDS = 10.0  # for everything but the body of a watch
READ_BYTES = 65536
BODY_BYTES_MAX = 64 << 20  # a page of 500 large pods has a few MiB
LINE_BYTES_MAX = 8 << 20  # etcd takes objects of 1.5 MiB; JSON is longer than what it stores
ERROR_BYTES_MAX = 65536
_OK, _FIRST_ERROR = 200, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiServer:
    """Where the API is. `roots` None: the system's; `token` None: no authentication."""

    host: str
    port: int
    tls: bool = True
    verify: bool = True
    roots: Path | None = ACCOUNT_FOLDER / "ca.crt"
    token: Path | None = ACCOUNT_FOLDER / "token"

    @property
    def authority(self) -> str:
        """Host and port as a request says them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def context(self) -> ssl.SSLContext:
        """Make the TLS settings; it reads the roots.

        Raises:
            OSError: they cannot be read (SSLError is one).
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.roots is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(self.roots)
        return context


class _Failure(msgspec.Struct):
    message: str = ""


@dataclass(slots=True)
class Answer:
    """An answer whose body is still to come."""

    status: int
    _stream: trio.abc.Stream = field(repr=False)
    _connection: h11.Connection = field(repr=False)

    async def piece(self) -> bytes | None:
        """Receive more of the body; None is its end."""
        event = await _next_event(self._stream, self._connection)
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def body(self, bytes_max: int = BODY_BYTES_MAX) -> bytes:
        """Receive the whole body.

        Raises:
            KubeError: it is longer than `bytes_max`.
        """
        parts = bytearray()
        while (piece := await self.piece()) is not None:
            parts += piece
            if len(parts) > bytes_max:
                raise KubeError(f"an answer of more than {bytes_max} bytes")
        return bytes(parts)


class Lines:
    """Cuts a body into lines."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take more bytes; give the lines that are complete, without empty ones.

        Raises:
            KubeError: a line is too long.
        """
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        if len(rest) > LINE_BYTES_MAX:
            raise KubeError(f"a watch event of more than {LINE_BYTES_MAX} bytes")
        return (bytes(line) for line in lines if line.strip())


class KubeClient:
    """The requests we need."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """Fetch something.

        Raises:
            KubeError: no answer, or a refusal (with its status).
        """
        with _translating(f"GET {path}"), trio.fail_after(REQUEST_SECONDS):
            async with self._request("GET", _target(path, query)) as answer:
                return await answer.body()

    async def merge_patch(self, path: str, change: object) -> None:
        """Change something by a JSON merge patch (RFC 7396).

        Raises:
            KubeError: no answer, or a refusal (with its status).
        """
        body = msgspec.json.encode(change)
        kind = "application/merge-patch+json"
        with _translating(f"PATCH {path}"), trio.fail_after(REQUEST_SECONDS):
            async with self._request("PATCH", path, body, kind) as answer:
                await answer.body()

    @asynccontextmanager
    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Open a request whose body goes on for as long as the server likes.

        Raises:
            KubeError: no answer in time, or a refusal; also what goes wrong inside the block.
        """
        with _translating(f"watch {path}"):
            async with self._request("GET", _target(path, query)) as answer:
                yield answer

    @asynccontextmanager
    async def _request(
        self, method: str, target: str, body: bytes = b"", kind: str = ""
    ) -> AsyncIterator[Answer]:
        with trio.fail_after(REQUEST_SECONDS):
            stream = await self._connect()
        try:
            with trio.fail_after(REQUEST_SECONDS):
                answer = await self._ask(stream, method, target, body, kind)
            yield answer
        finally:
            await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.abc.Stream:
        stream = await trio.open_tcp_stream(self._server.host, self._server.port)
        # A server that vanished without a word must not hold a watch for ever.
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
        stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPIDLE, 30)
        stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPINTVL, 10)
        stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPCNT, 3)
        if not self._server.tls:
            return stream
        try:
            secured = trio.SSLStream(
                stream,
                self._server.context(),
                server_hostname=self._server.host,
                https_compatible=True,
            )
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured

    async def _ask(
        self, stream: trio.abc.Stream, method: str, target: str, body: bytes, kind: str
    ) -> Answer:
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(method=method, target=target, headers=self._headers(body, kind))
        data = connection.send(request) or b""
        data += connection.send(h11.Data(data=body)) or b"" if body else b""
        data += connection.send(h11.EndOfMessage()) or b""
        await stream.send_all(data)
        event = await _next_event(stream, connection)
        while isinstance(event, h11.InformationalResponse):
            event = await _next_event(stream, connection)
        if not isinstance(event, h11.Response):
            raise KubeError("the server answered nothing")
        answer = Answer(event.status_code, stream, connection)
        if not _OK <= answer.status < _FIRST_ERROR:
            raise KubeError(await _reason(answer), status=answer.status)
        return answer

    def _headers(self, body: bytes, kind: str) -> list[tuple[str, str]]:
        headers = [
            ("host", self._server.authority),
            ("accept", "application/json"),
            ("user-agent", "ztunnel-cni-agent"),
            ("connection", "close"),
        ]
        if self._server.token is not None:
            token = self._server.token.read_text(encoding="ascii").strip()
            headers.append(("authorization", f"Bearer {token}"))
        if body:
            headers += [("content-type", kind), ("content-length", str(len(body)))]
        return headers


async def _next_event(stream: trio.abc.Stream, connection: h11.Connection) -> object:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))


async def _reason(answer: Answer) -> str:
    """Read why the server refused: a Status object, or any text."""
    body = await answer.body(ERROR_BYTES_MAX)
    try:
        text = msgspec.json.decode(body, type=_Failure).message
    except (msgspec.MsgspecError, ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
    return f"{answer.status} {text[:300]}"


@contextmanager
def _translating(what: str) -> Iterator[None]:
    try:
        yield
    except trio.TooSlowError as exc:
        raise KubeError(f"{what}: no answer in time") from exc
    except KubeError as exc:
        raise type(exc)(f"{what}: {exc}", status=exc.status) from exc
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError, UnicodeError) as exc:
        cause = exc.__cause__ or exc
        raise KubeError(f"{what}: {cause}") from exc


def _target(path: str, query: Mapping[str, str] | None) -> str:
    return f"{path}?{urlencode(query)}" if query else path
