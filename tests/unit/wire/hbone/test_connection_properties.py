"""What holds for every conversation, however the wire cuts it, and for bytes that are none."""

from __future__ import annotations

import gc
import sys

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame
from hypothesis import given, settings as hypothesis_settings, strategies as st

from tests.support.h2_oracle import (
    CONNECT_HEADERS,
    a_tunnel,
    an_established_client,
    an_established_pair,
    cut,
    frame,
    frames_of,
    solid,
    take,
)
from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.events import RequestReceived

SETTINGS, WINDOW_UPDATE = 4, 8
END_STREAM, PADDED = 1, 8


def padded(stream_id: int, payload: bytes, padding: int, flags: int = 0) -> bytes:
    return frame(0, flags | PADDED, stream_id, bytes([padding]) + payload + bytes(padding))


def a_conversation() -> bytes:
    """Everything a client may say to a server, in its bytes."""
    client = HboneConnection(client=True)
    client.receive(memoryview(frame(SETTINGS, 0, 0)))
    first = client.open(CONNECT_HEADERS)
    client.queue_data(first, b"hello")
    client.ping(b"12345678")
    client.finish(first)
    second = client.open([*CONNECT_HEADERS, (b"x", b"y" * 300)])
    wire = bytes(take(client)) + padded(second.id, b"padded", 20) + frame(0x77, 0, 0, b"?" * 10)
    wire += frame(2, 0, second.id, bytes(5)) + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\x05")
    client.reset(second, ErrorCodes.CANCEL)
    client.open(CONNECT_HEADERS)
    client.goaway()
    return wire + bytes(take(client)) + padded(5, b"end", 3, END_STREAM)


def what_a_server_makes_of(pieces: list[memoryview]) -> tuple[list[object], bytes]:
    server = HboneConnection(client=False)
    take(server)
    told = []
    for piece in pieces:
        told += solid(server.receive(piece))
    joined: list[object] = []
    for each in told:  # a cut may also split the payload of a frame
        last = joined[-1] if joined else None
        if each[0] == "data" and last is not None and last[:2] == each[:2]:
            joined[-1] = (*each[:2], last[2] + each[2])
        else:
            joined.append(each)
    return joined, bytes(take(server))


def test_every_cut_at_every_byte_means_the_same():
    wire = a_conversation()
    whole = what_a_server_makes_of([memoryview(wire)])
    assert ("data", 5, b"end") in whole[0]
    assert len(whole[0]) == 13
    for at in range(1, len(wire)):
        assert what_a_server_makes_of(cut(wire, [at])) == whole
    assert what_a_server_makes_of(cut(wire, range(len(wire)))) == whole


@hypothesis_settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_any_cuts_mean_the_same(cuts: list[int]):
    wire = a_conversation()
    assert what_a_server_makes_of(cut(wire, cuts)) == what_a_server_makes_of([memoryview(wire)])


some_frame = st.builds(
    frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.sampled_from([0, 0, 1, 1, 2, 3, 5, 2**31 - 1]),
    st.binary(max_size=40),
)


@pytest.mark.parametrize("role", ["client", "server"])
@hypothesis_settings(max_examples=300)
@given(wire=st.lists(st.one_of(some_frame, st.binary(max_size=12)), max_size=30), cuts=st.data())
def test_any_bytes_are_events_or_a_tunnel_error(role: str, wire: list[bytes], cuts: st.DataObject):
    client, server = an_established_pair()
    a_tunnel(client, server)
    client.open(CONNECT_HEADERS)
    end = client if role == "client" else server
    pieces = cut(b"".join(wire), cuts.draw(st.lists(st.integers(0, 400), max_size=4)))
    for piece in pieces:
        try:
            events = end.receive(piece)
        except TunnelError:
            *_, goodbye = frames_of(take(end))
            assert isinstance(goodbye, GoAwayFrame)
            return
        for event in events:
            if isinstance(event, RequestReceived):
                end.respond(event.stream, 200)
        assert len(end._partial) <= 9 + 16_384
        assert all(not (each.local_ended and each.remote_ended) for each in end.streams.values())
    frames_of(take(end))


def test_ten_thousand_streams_do_not_slow_down_the_next():
    client = an_established_client()
    client.peer_max_concurrent_streams = 20_000

    def steps_to_open() -> int:
        """Count the function calls, the only clock that is the same on every machine."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        gc.disable()  # else what others do at a collection may be counted
        sys.setprofile(count)
        try:
            client.open(CONNECT_HEADERS)
        finally:
            sys.setprofile(None)
            gc.enable()
        return calls

    for _ in range(3):  # the second time the fields enter the table, then are found there
        client.open(CONNECT_HEADERS)
    early = steps_to_open()
    for _ in range(10_000):
        client.open(CONNECT_HEADERS)
    assert steps_to_open() == early
