from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cni.plugin.unix_http import (
    AnswerError,
    Deadline,
    connect,
    parse_head,
    receive,
    request,
    send,
    unchunk,
)
from tests.support.plugin_agent import StandInAgent, http_answer

SOON = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours, theirs


def answered(pair: tuple[socket.socket, socket.socket], answer: bytes) -> tuple[int, bytes]:
    ours, theirs = pair
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    return receive(ours, Deadline(SOON), body_bytes_max=1000)


def test_a_request_says_how_long_it_is() -> None:
    assert request("/cmdadd", b"{}") == (
        b"POST /cmdadd HTTP/1.1\r\nHost: unix\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
    )


def test_the_body_of_a_failure_is_its_reason(pair: tuple[socket.socket, socket.socket]) -> None:
    assert answered(pair, http_answer(500, "no proxy\n")) == (500, b"no proxy\n")


def test_nobody_waits_for_the_body_of_a_success(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
    assert receive(ours, Deadline(SOON), body_bytes_max=10) == (200, b"")


def test_a_body_of_many_pieces_is_joined() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        theirs.sendall(http_answer(500, "x" * 100_000))
        theirs.shutdown(socket.SHUT_WR)
        assert receive(ours, Deadline(SOON), body_bytes_max=200_000) == (500, b"x" * 100_000)


def test_a_body_is_cut_at_its_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    assert answered(pair, http_answer(500, "x" * 5000)) == (500, b"x" * 1000)


def test_chunks_are_joined(pair: tuple[socket.socket, socket.socket]) -> None:
    head = b"HTTP/1.1 500 X\r\nTRANSFER-Encoding: chunked\r\n\r\n"
    assert answered(pair, head + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n") == (
        500,
        b"abc0123456789",
    )


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"x" * 70_000, b"SSH-2.0\r\n\r\n"])
def test_what_is_no_answer_is_said_to_be_none(
    pair: tuple[socket.socket, socket.socket], answer: bytes
) -> None:
    with pytest.raises(AnswerError):
        answered(pair, answer)


@pytest.mark.parametrize(
    "line", ["HTTP/2 200", "HTTP/1.1 20", "HTTP/1.1 ²00 OK", "HTTP/1.1 0200", ""]
)
def test_a_status_line_must_be_one(line: str) -> None:
    with pytest.raises(AnswerError):
        parse_head(line.encode("latin-1"))


@given(st.binary(max_size=300))
def test_any_head_is_read_or_refused(head: bytes) -> None:
    try:
        status, _ = parse_head(head)
    except AnswerError:
        return
    assert 100 <= status <= 999


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.integers(0, 300))
def test_chunks_that_are_cut_short_give_what_came(chunks: list[bytes], cut: int) -> None:
    wire = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    assert unchunk(wire) == b"".join(chunks)
    assert b"".join(chunks).startswith(unchunk(wire[:cut]))


@given(st.binary(max_size=200) | st.text("0123456789abcdef-\r\n;", max_size=60).map(str.encode))
def test_chunks_of_nonsense_come_to_an_end(body: bytes) -> None:
    assert len(unchunk(body)) <= len(body)


def test_time_runs_out(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(TimeoutError):
        Deadline(0).seconds_left()
    with pytest.raises(TimeoutError):
        receive(pair[0], Deadline(0.01), body_bytes_max=10)


def test_a_long_request_is_sent_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    data = bytes(1_000_000)
    received = bytearray()

    def drain() -> None:
        while piece := theirs.recv(65536):
            received.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    send(ours, data, Deadline(SOON), fds=[])
    ours.shutdown(socket.SHUT_WR)
    thread.join(SOON)
    assert received == data


def test_nobody_there_is_an_error_at_once_or_when_time_is_up(tmp_path: Path) -> None:
    for patiently in (False, True):
        with pytest.raises(FileNotFoundError):
            connect(str(tmp_path / "x"), Deadline(0.01), patiently=patiently)


def test_a_path_that_is_too_long_is_an_error() -> None:
    with pytest.raises(OSError, match="too long"):
        connect("/" + "x" * 200, Deadline(SOON), patiently=True)


def test_a_listener_that_comes_late_is_waited_for() -> None:
    late = StandInAgent()
    starter = threading.Timer(0.1, late.__enter__)
    starter.start()
    try:
        connect(str(late.path), Deadline(SOON), patiently=True).close()
    finally:
        starter.join(SOON)
        late.__exit__(None, None, None)
