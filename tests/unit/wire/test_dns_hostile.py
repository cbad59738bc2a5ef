"""Messages that broke others: the header of each is good, what follows is not."""

from __future__ import annotations

import pytest

from ztunnel.wire import dns as wire
from ztunnel.wire.dns import MessageSplitter, Query, Rcode, Refused, is_answer

HEAD = b"\x12\x67\1\0"
ONE_QUESTION = HEAD + b"\0\1\0\0\0\0\0\0"
WITH_RECORD = HEAD + b"\0\1\0\0\0\0\0\1"
TAIL = b"\0\1\0\1"
QUESTION = b"\1a\0" + TAIL

MALFORMED = [
    pytest.param(ONE_QUESTION + b"\xc0\x0c" + TAIL, id="a pointer to itself"),
    pytest.param(ONE_QUESTION + b"\1a\xc0\x0c" + TAIL, id="a pointer to the name's own start"),
    pytest.param(ONE_QUESTION + b"\xc0\x00" + TAIL, id="a pointer into the header"),
    pytest.param(ONE_QUESTION + b"\xff\xff" + TAIL, id="a pointer beyond the message"),
    pytest.param(ONE_QUESTION + b"\xc0", id="half a pointer"),
    pytest.param(ONE_QUESTION + b"\x41" + b"a" * 65 + b"\0" + TAIL, id="an extended label type"),
    pytest.param(ONE_QUESTION + b"\x80" + b"a" * 128 + b"\0" + TAIL, id="a reserved label type"),
    pytest.param(ONE_QUESTION + b"\x3f" + b"a" * 62, id="a label beyond the end"),
    pytest.param(ONE_QUESTION + b"\x3faaa", id="a label cut short"),
    pytest.param(ONE_QUESTION + (b"\x3f" + b"a" * 63) * 4 + b"\0" + TAIL, id="a name of 257"),
    pytest.param(ONE_QUESTION + b"\1a" * 200 + b"\0" + TAIL, id="200 labels"),
    pytest.param(ONE_QUESTION + b"\1a", id="a name without an end"),
    pytest.param(ONE_QUESTION + b"\1a\0\0\1\0", id="half a class"),
    pytest.param(HEAD + b"\xff\xff" * 4, id="every count at its most"),
    pytest.param(HEAD + b"\0\1\xff\xff\0\0\0\0" + QUESTION, id="answers that are not there"),
    pytest.param(WITH_RECORD + QUESTION + b"\0\0\x29\4\xd0\0\0\0\0\xff\xff", id="a long OPT"),
    pytest.param(WITH_RECORD + QUESTION + b"\xc0", id="a record with half a pointer"),
    pytest.param(WITH_RECORD + QUESTION + b"\x40" + bytes(99), id="a record with an odd label"),
    pytest.param(WITH_RECORD + QUESTION, id="a record that is not there"),
]


@pytest.mark.parametrize("data", MALFORMED)
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


@pytest.mark.parametrize("data", MALFORMED)
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
