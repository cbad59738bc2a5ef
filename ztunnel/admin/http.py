"""A small strict HTTP/1.1 server for operators: one request, one answer, close.

It reads a request's head of at most 8 KiB within 2 s, ignores a body, answers GET, HEAD and POST
on exact paths, and closes. That is all a probe, a scrape and istioctl need, and it leaves nothing
to smuggle: what follows a head is never taken for a second request.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs

import trio

from ztunnel.telemetry import log as logs
from ztunnel.transport.pace import Pace

HEAD_BYTES_MAX = 8192  # as the reference
HEAD_SECONDS = 2.0  # as the reference
ANSWER_SECONDS = 120.0  # for a dump of a large mesh through a slow port-forward
LINGER_SECONDS = 1.0
PIECE_BYTES = 8192  # of a page: a tenth of a millisecond
EMPTY_LINE_BYTES = 32  # what a line counts as that was looked for and is not there
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
HTML = "text/html; charset=utf-8"

log = logs.get("admin::http")

_REQUEST_LINE = re.compile(rb"(GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH) (/[!-~]*) (HTTP/1\.[01])")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")


class BadRequestError(ValueError):
    """What was sent is not a request head; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request head; header names in lower case."""

    method: str
    path: str
    version: str  # HTTP/1.0 or HTTP/1.1
    query: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer.

    A body of one tuple is sent with its length. Any other iterable is drawn while it is sent, so
    that a large one does not stop the loop: each piece takes at most 0.2 ms to make, and an empty
    piece took some time as well. `prepare` is awaited before that.
    """

    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT
    pieces: Iterable[bytes] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], Awaitable[None]] | None = None


Handler = Callable[[Request], Response]
Routes = Mapping[str, Handler]


def text(body: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Make a plain-text answer."""
    return Response(status=status, pieces=(body.encode(),))


def parse_head(head: bytes) -> Request:
    """Read a request head, without the empty line at its end (RFC 9112 s3, s5).

    Raises:
        BadRequestError: it is not one.
    """
    first, *lines = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise BadRequestError("malformed request line")
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise BadRequestError("malformed header")
        headers[header[1].decode().lower()] = header[2].decode("latin-1")
    path, _, query = match[2].decode().partition("?")
    try:
        values = parse_qs(query, keep_blank_values=True, max_num_fields=32)
    except ValueError:
        raise BadRequestError("malformed query") from None
    return Request(
        method=match[1].decode(),
        version=match[3].decode(),
        path=path,
        query={key: given[-1] for key, given in values.items()},
        headers=headers,
    )


async def read_head(stream: trio.abc.ReceiveStream) -> Request | None:
    """Receive one request head; None if the peer left without a word.

    Raises:
        BadRequestError: it is malformed, too long or cut off.
    """
    head = bytearray()
    while (end := head.find(b"\r\n\r\n")) < 0:
        if len(head) >= HEAD_BYTES_MAX:
            raise BadRequestError(f"request head is longer than {HEAD_BYTES_MAX} bytes")
        received = await stream.receive_some(HEAD_BYTES_MAX - len(head))
        if not received:
            if not head:
                return None
            raise BadRequestError("request head is cut off")
        head += received
    return parse_head(bytes(head[:end]))


async def serve_connection(
    stream: trio.abc.HalfCloseableStream, routes: Routes, pace: Pace
) -> None:
    """Answer one request on `stream` and close it. Only Cancelled escapes."""
    try:
        async with stream:
            request: Request | None = None
            with trio.move_on_after(HEAD_SECONDS):
                try:
                    request = await read_head(stream)
                except BadRequestError as exc:
                    await _send(stream, text(f"{exc}\n", HTTPStatus.BAD_REQUEST), None, pace)
                    await _linger(stream)
            if request is not None:
                with trio.move_on_after(ANSWER_SECONDS):
                    await _send(stream, _answer(request, routes), request, pace)
                    await _linger(stream)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the operator's tool left; nobody is there to be told
    except Exception:  # while a body was made: it breaks off, but the node's proxy must not
        log.exception("admin answer failed")


def _answer(request: Request, routes: Routes) -> Response:
    handler = routes.get(request.path)
    if handler is None:
        return Response(status=HTTPStatus.NOT_FOUND)
    try:
        return handler(request)
    except Exception as exc:  # a page that fails must not take the node's proxy down
        log.exception("admin page failed", path=request.path)
        return text(f"{type(exc).__name__}: {exc}\n", HTTPStatus.INTERNAL_SERVER_ERROR)


async def _send(
    stream: trio.abc.SendStream, response: Response, request: Request | None, pace: Pace
) -> None:
    """Send head and body; a body of unknown length is chunked, so that a cut shows."""
    if response.prepare is not None:
        await response.prepare()
    body = response.pieces
    known = isinstance(body, tuple)
    chunked = not known and request is not None and request.version == "HTTP/1.1"
    await stream.send_all(_head(response, chunked=chunked))
    if request is not None and request.method == "HEAD":
        return
    if known:
        await stream.send_all(b"".join(body))
        return
    pieces = iter(body)
    while (piece := await _drawn(pieces, pace)) is not None:
        if chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        await stream.send_all(piece)
    if chunked:
        await stream.send_all(b"0\r\n\r\n")


async def _drawn(pieces: Iterator[bytes], pace: Pace) -> bytes | None:
    """Make as much of a body as fits into a turn; None at its end."""
    made = []
    with await pace.turn() as turn:
        for piece in pieces:
            made.append(piece)
            if turn.is_over:
                break
    return b"".join(made) if made else None


def _head(response: Response, *, chunked: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {response.status.value} {response.status.phrase}",
        f"content-type: {response.content_type}",
        "connection: close",
        "cache-control: no-cache",
        "x-content-type-options: nosniff",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    if chunked:
        lines.append("transfer-encoding: chunked")
    elif isinstance(response.pieces, tuple):
        lines.append(f"content-length: {sum(map(len, response.pieces))}")
    return "\r\n".join([*lines, "", ""]).encode()


async def _linger(stream: trio.abc.HalfCloseableStream) -> None:
    """Let the peer read everything: closing with unread input would reset the connection."""
    await stream.send_eof()
    with trio.move_on_after(LINGER_SECONDS):
        while await stream.receive_some(PIECE_BYTES):
            pass


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Compress a body as gzip while it is made."""
    packer = zlib.compressobj(level=1, wbits=31)  # the fastest; labels shrink twentyfold anyway
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def gathered(lines: Iterable[str]) -> Iterator[bytes]:
    """Join lines to pieces of a good size for sending; an empty one took some time as well."""
    waiting: list[str] = []
    size = 0
    for line in lines:
        waiting.append(line)
        size += len(line) or EMPTY_LINE_BYTES
        if size >= PIECE_BYTES:
            yield "".join(waiting).encode()
            waiting, size = [], 0
    yield "".join(waiting).encode()
