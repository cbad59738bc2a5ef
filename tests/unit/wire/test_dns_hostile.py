from __future__ import annotations

import pytest

from tests.support.dns_corpus import HEAD, MALFORMED, ONE_QUESTION, QUESTION, TAIL
from ztunnel.wire import dns as wire
from ztunnel.wire.dns import MessageSplitter, Query, Rcode, Refused, is_answer

MESSAGES = pytest.mark.parametrize("data", MALFORMED.values(), ids=list(MALFORMED))


@MESSAGES
def test_it_is_refused_and_no_more(data: bytes) -> None:
    read = wire.parse_query(data)
    assert isinstance(read, Refused)
    assert read.rcode is Rcode.FORMERR
    assert read.reply == HEAD[:2] + b"\x81\x81" + bytes(8)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(b"\1\0\0", id="a zero byte"),
        pytest.param(b"\1.\0", id="a dot"),
        pytest.param(b"\1\\\0", id="a backslash"),
        pytest.param(b"\1\n\0", id="a line end"),
        pytest.param(b"\1*\1a\0", id="a wildcard"),
        pytest.param(b"\4\xf0\x9f\x92\xa9\0", id="UTF-8"),
        pytest.param(b"\1@\0", id="the zone itself in a master file"),
        pytest.param((b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0", id="a name of 255"),
        pytest.param(b"\1a" * 127 + b"\0", id="127 labels"),
    ],
)
def test_odd_names_are_names(name: bytes) -> None:
    query = wire.parse_query(ONE_QUESTION + name + TAIL)
    assert isinstance(query, Query)
    assert query.name.isprintable()
    assert query.question == name + TAIL


def test_what_follows_a_query_is_not_looked_at() -> None:
    assert isinstance(wire.parse_query(ONE_QUESTION + QUESTION + b"junk" * 100), Query)


@MESSAGES
def test_it_is_no_answer(data: bytes) -> None:
    response = data[:2] + b"\x81\x80" + data[4:]
    assert not is_answer(response, 0x1267, b"\1b\0" + TAIL)


def test_a_stream_of_empty_messages_is_just_that() -> None:
    splitter = MessageSplitter()
    assert list(splitter.feed(bytes(20))) == [b""] * 10
    assert wire.parse_query(b"") is None


def test_a_query_longer_than_any_is_refused() -> None:
    padding = bytes(wire.QUERY_BYTES_MAX - len(ONE_QUESTION + QUESTION))
    assert isinstance(wire.parse_query(ONE_QUESTION + QUESTION + padding), Query)
    read = wire.parse_query(ONE_QUESTION + QUESTION + padding + b"!")
    assert isinstance(read, Refused)
    assert read.rcode is Rcode.FORMERR


@pytest.mark.parametrize("length", [9, 65535])
def test_a_message_that_is_too_long_ends_a_stream(length: int) -> None:
    splitter = MessageSplitter(8)
    stream = wire.framed(b"x" * 8) + length.to_bytes(2, "big") + wire.framed(b"y")
    assert list(splitter.feed(stream)) == [b"x" * 8]
    assert splitter.is_too_long
    assert list(splitter.feed(wire.framed(b"z"))) == []
