from __future__ import annotations

import contextlib
import gzip
import itertools
from collections.abc import Iterator
from http import HTTPStatus

import pytest
import structlog
import trio
import trio.testing
from hypothesis import given, strategies as st
from trio.testing import MockClock

from ztunnel.admin.http import (
    HEAD_BYTES_MAX,
    HEAD_SECONDS,
    LINGER_SECONDS,
    BadRequestError,
    Request,
    Response,
    compressed,
    gathered,
    parse_head,
    serve_connection,
    text,
)
from ztunnel.transport.pace import Pace


def one_piece_a_turn() -> Pace:
    """Make a pace whose turns are over at the first look at the clock."""
    return Pace(clock=itertools.count().__next__)


def hello(request: Request) -> Response:
    return text(f"{request.method} {request.query.get('name', '')}\n")


def broken(_: Request) -> Response:
    raise KeyError("lost")


def long(_: Request) -> Response:
    def pieces() -> Iterator[bytes]:
        yield b"one\n"
        yield b""
        yield b"two\n"

    return Response(pieces=pieces())


def cut(_: Request) -> Response:
    def pieces() -> Iterator[bytes]:
        yield b"one\n"
        raise KeyError("changed meanwhile")

    return Response(pieces=pieces())


def prepared(_: Request) -> Response:
    found: list[bytes] = []

    async def prepare() -> None:
        await trio.lowlevel.checkpoint()
        found.append(b"gathered\n")

    return Response(pieces=(piece for piece in found), prepare=prepare)


ROUTES = {"/": hello, "/broken": broken, "/long": long, "/cut": cut, "/prepared": prepared}


async def ask(request: bytes, *, finish: bool = True) -> bytes:
    """Send `request` and give everything that comes back."""
    ours, theirs = trio.testing.memory_stream_pair()
    answer = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, ROUTES, one_piece_a_turn())
        await ours.send_all(request)
        if finish:
            await ours.send_eof()
        async for received in ours:
            answer += received
        await ours.aclose()
    return bytes(answer)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def test_what_a_page_needs_is_awaited_before_it_is_made() -> None:
    assert b"gathered" in await ask(b"GET /prepared HTTP/1.1\r\n\r\n")


async def test_a_page_is_answered_and_the_connection_closed() -> None:
    answer = await ask(b"GET /?name=a%20b HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"content-type: text/plain; charset=utf-8",
        b"connection: close",
        b"cache-control: no-cache",
        b"x-content-type-options: nosniff",
        b"content-length: 8",
    ]
    assert body == b"GET a b\n"


async def test_an_unknown_path_is_404_without_a_body() -> None:
    answer = await ask(b"GET /nowhere HTTP/1.1\r\n\r\n")
    assert status_of(answer) == HTTPStatus.NOT_FOUND
    assert body_of(answer) == b""


async def test_a_head_request_gets_no_body() -> None:
    answer = await ask(b"HEAD / HTTP/1.1\r\n\r\n")
    assert status_of(answer) == HTTPStatus.OK
    assert body_of(answer) == b""


async def test_a_page_that_fails_is_500_with_the_error() -> None:
    with structlog.testing.capture_logs():
        answer = await ask(b"GET /broken HTTP/1.1\r\n\r\n")
    assert status_of(answer) == HTTPStatus.INTERNAL_SERVER_ERROR
    assert body_of(answer) == b"KeyError: 'lost'\n"


async def test_a_body_of_unknown_length_is_chunked() -> None:
    answer = await ask(b"GET /long HTTP/1.1\r\n\r\n")
    assert b"transfer-encoding: chunked" in answer
    assert body_of(answer) == b"4\r\none\n\r\n4\r\ntwo\n\r\n0\r\n\r\n"


async def test_an_old_client_gets_its_body_unchunked() -> None:
    assert body_of(await ask(b"GET /long HTTP/1.0\r\n\r\n")) == b"one\ntwo\n"


async def test_a_body_that_breaks_off_does_not_look_complete() -> None:
    with structlog.testing.capture_logs() as entries:
        answer = await ask(b"GET /cut HTTP/1.1\r\n\r\n")
    assert body_of(answer) == b"4\r\none\n\r\n"
    assert [entry["event"] for entry in entries] == ["admin answer failed"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"GET nowhere HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\na : b\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\nc: d\r\n\r\n",
        b"GET /?" + b"a&" * 100 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\xff",
        b"GET /" + b"a" * HEAD_BYTES_MAX,
    ],
)
async def test_a_malformed_head_is_refused(request_: bytes) -> None:
    answer = await ask(request_)
    assert status_of(answer) == HTTPStatus.BAD_REQUEST


async def test_what_follows_a_head_is_never_a_second_request() -> None:
    answer = await ask(b"POST / HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\n\x00garbage")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert body_of(answer) == b"POST \n"


async def test_a_peer_that_says_nothing_gets_nothing() -> None:
    assert await ask(b"") == b""


async def test_a_slow_head_has_two_seconds(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    assert await ask(b"GET / HTTP/1.1\r\n", finish=False) == b""
    assert trio.current_time() - began == pytest.approx(HEAD_SECONDS)


async def test_a_head_that_comes_byte_by_byte_is_a_head() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, ROUTES, one_piece_a_turn())
        for byte in b"GET / HTTP/1.1\r\nHost: x\r\n\r\n":
            await ours.send_all(bytes([byte]))
        answer = bytearray()
        async for received in ours:
            answer += received
        await ours.aclose()
    assert status_of(bytes(answer)) == HTTPStatus.OK


async def test_a_peer_that_never_leaves_is_left(autojump_clock: MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, ROUTES, one_piece_a_turn())
        await ours.send_all(b"GET / HTTP/1.1\r\n\r\n")
    assert trio.current_time() - began == pytest.approx(LINGER_SECONDS)
    await ours.aclose()


async def test_a_peer_that_leaves_early_harms_nobody() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(b"GET /long HTTP/1.1\r\n\r\n")
    await ours.aclose()
    await serve_connection(theirs, ROUTES, one_piece_a_turn())


async def test_cancelled_while_waiting_it_closes_its_stream() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, ROUTES, one_piece_a_turn())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await ours.receive_some() == b""


def test_header_names_are_lower_case_and_values_trimmed() -> None:
    request = parse_head(b"GET /a?b=1&b=2&c= HTTP/1.1\r\nX-A: \t b c \t\r\nEmpty:")
    assert request == Request(
        method="GET",
        path="/a",
        version="HTTP/1.1",
        query={"b": "2", "c": ""},
        headers={"x-a": "b c", "empty": ""},
    )


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda b: b"GET /" + b + b" HTTP/1.1"))
def test_any_bytes_are_a_head_or_a_bad_request(head: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        parse_head(head)


@given(st.lists(st.text(max_size=50)))
def test_gathered_and_compressed_lines_come_out_again(lines: list[str]) -> None:
    lines = [line.encode("utf-8", "replace").decode() for line in lines]
    packed = b"".join(compressed(gathered(lines)))
    assert gzip.decompress(packed).decode() == "".join(lines)


def test_gathering_makes_pieces_of_a_good_size() -> None:
    pieces = list(gathered("x" * 100 for _ in range(1000)))
    assert max(map(len, pieces)) < 10_000
    assert len(pieces) < 20


def test_gathering_rests_where_nothing_is_to_be_said_for_long() -> None:
    looked_at = iter(range(100_000))
    last, most = 0, 0
    for piece in gathered("" for _ in looked_at):
        assert piece == b""
        now = next(looked_at, 100_000)
        last, most = now, max(most, now - last)
    assert most < 1000
