from __future__ import annotations

import gc

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame, RstStreamFrame, WindowUpdateFrame

from tests.support.h2_oracle import (
    CONNECT_HEADERS,
    a_tunnel,
    an_established_client,
    an_established_pair,
    an_established_server,
    cut,
    frame,
    frames_of,
    solid,
    take,
)
from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.connection import HboneConnection, HboneSettings, pack_data_header
from ztunnel.wire.hbone.events import DataReceived

DATA, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 3, 4, 6, 8
END_STREAM, PADDED = 1, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, payload)


def padded(stream_id: int, payload: bytes, padding: int, flags: int = 0) -> bytes:
    return data(stream_id, bytes([padding]) + payload + bytes(padding), flags | PADDED)


def a_server_with_tunnels(count: int = 1) -> HboneConnection:
    client, server = an_established_pair()
    for _ in range(count):
        a_tunnel(client, server)
    return server


def code_of_failure(end: HboneConnection, wire: bytes) -> int:
    with pytest.raises(TunnelError) as caught:
        end.receive(memoryview(wire))
    return caught.value.code


def test_payload_is_handed_out_without_a_copy():
    server = a_server_with_tunnels()
    buffer = bytearray(data(1, b"hello"))
    (event,) = server.receive(memoryview(buffer))
    assert isinstance(event, DataReceived)
    (chunk,) = event.chunks
    assert chunk.obj is buffer


def test_nothing_of_the_callers_buffer_is_kept():
    server = a_server_with_tunnels()
    for wire in (data(1, bytes(100))[:50], bytes(59) + data(1, b"x")[:5], data(1, b"x")[5:]):
        buffer = bytearray(wire)
        view = memoryview(buffer)
        server.receive(view)
        view.release()
        gc.collect()
        buffer.append(0)  # a bytearray that is referred to refuses to grow


def test_frames_of_one_stream_come_as_one_event():
    server = a_server_with_tunnels(2)
    wire = data(1, b"ab") + data(1, b"cd") + data(3, b"x") + data(1, b"e")
    events = server.receive(memoryview(wire))
    assert [(each.stream.id, each.size, len(each.chunks)) for each in events] == [
        (1, 4, 2),
        (3, 1, 1),
        (1, 1, 1),
    ]


def test_a_part_of_a_frame_comes_at_once():
    server = a_server_with_tunnels()
    wire = data(1, b"hello world", END_STREAM)
    assert solid(server.receive(memoryview(wire[:14]))) == [("data", 1, b"hello")]
    assert solid(server.receive(memoryview(wire[14:]))) == [("data", 1, b" world"), ("ended", 1)]


def test_bytes_of_a_dead_stream_never_reach_the_next_one():
    server = a_server_with_tunnels(2)
    server.reset(server.streams[1], ErrorCodes.CANCEL)
    wire = data(1, b"secret") + data(3, b"public") + data(1, b"more") + data(3, b"!", END_STREAM)
    assert solid(server.receive(memoryview(wire))) == [("data", 3, b"public!"), ("ended", 3)]


@pytest.mark.parametrize("at", range(1, 16))
def test_the_rest_of_a_frame_is_dropped_when_its_stream_is_reset_halfway(at: int):
    server = a_server_with_tunnels(2)
    wire = data(1, b"secret!", END_STREAM) + data(3, b"public")
    server.receive(memoryview(wire[:at]))
    server.reset(server.streams[1], ErrorCodes.CANCEL)
    assert solid(server.receive(memoryview(wire[at:]))) == [("data", 3, b"public")]


def test_a_stream_that_the_peer_resets_halfway_through_a_read_keeps_what_came():
    server = a_server_with_tunnels(2)
    wire = data(1, b"last") + frame(RST_STREAM, 0, 1, bytes(4)) + data(3, b"x")
    assert solid(server.receive(memoryview(wire))) == [
        ("data", 1, b"last"),
        ("reset", 1, 0, True),
        ("data", 3, b"x"),
    ]


def test_padding_is_dropped_but_counts():
    server = a_server_with_tunnels()
    before = server.streams[1].receive_window, server._receive_window
    wire = padded(1, b"abc", 200) + padded(1, b"", 0) + padded(1, b"d", 1, END_STREAM)
    stream = server.streams[1]
    assert solid(server.receive(memoryview(wire))) == [("data", 1, b"abcd"), ("ended", 1)]
    used = 4 + 3 + 201
    assert (stream.receive_window, server._receive_window) == (before[0] - used, before[1] - used)
    assert stream.owed == 3 + 201


def test_all_padding_that_fits_is_taken_and_one_byte_more_is_not():
    server = a_server_with_tunnels()
    assert server.receive(memoryview(data(1, b"\x03abc", PADDED))) == []
    assert code_of_failure(server, data(1, b"\x04abc", PADDED)) == ErrorCodes.PROTOCOL_ERROR


def test_padded_data_without_a_padding_length_ends_the_connection():
    assert code_of_failure(a_server_with_tunnels(), data(1, b"", PADDED)) == (
        ErrorCodes.PROTOCOL_ERROR
    )


def test_unknown_frames_are_passed_over_however_long():
    server = a_server_with_tunnels()
    wire = frame(0x77, 255, 1, bytes(500_000)) + frame(0x10, 0, 0, b"") + data(1, b"x")
    told = [each for piece in cut(wire, [5, 400_000, 500_012]) for each in server.receive(piece)]
    assert solid(told) == [("data", 1, b"x")]
    assert not server._partial


def test_the_reserved_bit_of_a_stream_number_is_ignored():
    server = a_server_with_tunnels()
    assert solid(server.receive(memoryview(data(1 | 2**31, b"x")))) == [("data", 1, b"x")]


def test_data_beyond_a_streams_window_costs_the_stream():
    server = a_server_with_tunnels(2)
    server.streams[1].receive_window = 10
    wire = data(1, b"12345") + data(1, b"123456") + data(3, b"x")
    assert solid(server.receive(memoryview(wire))) == [
        ("data", 1, b"12345"),
        ("reset", 1, ErrorCodes.FLOW_CONTROL_ERROR, False),
        ("data", 3, b"x"),
    ]


def test_data_beyond_the_connections_window_ends_the_connection():
    server = a_server_with_tunnels()
    server._receive_window = 10
    assert code_of_failure(server, data(1, bytes(11))) == ErrorCodes.FLOW_CONTROL_ERROR


def test_connection_credit_goes_back_on_receipt():
    server = a_server_with_tunnels()
    for _ in range(4):
        server.receive(memoryview(data(1, bytes(2**20))))
    (update,) = frames_of(take(server))
    assert isinstance(update, WindowUpdateFrame)
    assert (update.stream_id, update.window_increment) == (0, 4 * 2**20)
    assert server._receive_window == 16 * 2**20


def test_data_of_dead_streams_returns_credit_too():
    server = a_server_with_tunnels()
    server.reset(server.streams[1], ErrorCodes.CANCEL)
    take(server)
    for _ in range(64):
        assert server.receive(memoryview(data(1, bytes(2**20)))) == []
    updates = frames_of(take(server))
    assert sum(each.window_increment for each in updates) == 64 * 2**20
    assert {each.stream_id for each in updates} == {0}


def test_data_for_a_stream_that_ended_is_answered_once():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    client.finish(near)
    server.finish(far)
    server.receive(take(client))
    take(server)
    assert server.receive(memoryview(data(1, b"x") * 5)) == []
    (reset,) = frames_of(take(server))
    assert isinstance(reset, RstStreamFrame)
    assert reset.error_code == ErrorCodes.STREAM_CLOSED


def test_data_after_the_end_costs_the_stream():
    server = a_server_with_tunnels()
    wire = data(1, b"x", END_STREAM) + data(1, b"y")
    assert solid(server.receive(memoryview(wire))) == [
        ("data", 1, b"x"),
        ("ended", 1),
        ("reset", 1, ErrorCodes.STREAM_CLOSED, False),
    ]


def test_data_before_the_response_costs_the_stream():
    client = an_established_client()
    client.open(CONNECT_HEADERS)
    assert solid(client.receive(memoryview(data(1, b"x")))) == [
        ("reset", 1, ErrorCodes.PROTOCOL_ERROR, False)
    ]


@pytest.mark.parametrize("stream_id", [0, 2, 3])
def test_data_on_a_stream_that_never_was_ends_the_connection(stream_id: int):
    server = a_server_with_tunnels()
    assert code_of_failure(server, data(stream_id, b"x")) == ErrorCodes.PROTOCOL_ERROR


def test_frames_larger_than_announced_end_the_connection_at_their_header():
    server = a_server_with_tunnels()
    header = (2**20 + 1).to_bytes(3, "big") + bytes([DATA, 0]) + (1).to_bytes(4, "big")
    assert code_of_failure(server, header) == ErrorCodes.FRAME_SIZE_ERROR


@pytest.mark.parametrize("kind", [1, 4, 7, 9])
def test_control_frames_too_large_to_keep_end_the_connection_at_their_header(kind: int):
    server = a_server_with_tunnels()
    if kind == 9:
        server.receive(memoryview(frame(1, 0, 3)))
    header = (200_000).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4)
    assert code_of_failure(server, header) == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", PREFACE[:-1] + b"x"])
def test_a_server_wants_the_preface(wire: bytes):
    server = HboneConnection(client=False)
    assert code_of_failure(server, wire) == ErrorCodes.PROTOCOL_ERROR


def test_half_a_preface_is_no_failure_yet():
    server = HboneConnection(client=False)
    assert server.receive(memoryview(PREFACE[:10])) == []
    assert server.receive(memoryview(PREFACE[10:])) == []
    assert code_of_failure(server, data(1, b"x")) == ErrorCodes.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "first", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, 1, 0), frame(0x77, 0, 0), data(1, b"x")]
)
def test_the_first_frame_must_be_settings(first: bytes):
    assert code_of_failure(HboneConnection(client=True), first) == ErrorCodes.PROTOCOL_ERROR


def test_a_failed_connection_says_goodbye_once_and_stays_failed():
    server = a_server_with_tunnels()
    assert code_of_failure(server, data(0, b"x")) == ErrorCodes.PROTOCOL_ERROR
    (goaway,) = frames_of(take(server))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.error_code, goaway.last_stream_id) == (ErrorCodes.PROTOCOL_ERROR, 1)
    assert goaway.additional_data == b"DATA on stream 0, which never was"
    assert code_of_failure(server, frame(PING, 0, 0, bytes(8))) == ErrorCodes.PROTOCOL_ERROR
    assert not server.control


def test_the_shell_may_frame_data_itself():
    client, server = an_established_pair()
    near, _ = a_tunnel(client, server)
    buffer = bytearray(9) + b"bulk"
    pack_data_header(buffer, 0, near.id, 4)
    client.charge(near, 4)
    assert solid(server.receive(memoryview(buffer))) == [("data", 1, b"bulk")]


def test_both_ends_forget_a_finished_stream():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    client.finish(near)
    server.finish(far)
    assert solid(server.receive(take(client))) == [("ended", 1)]
    assert solid(client.receive(take(server))) == [("ended", 1)]
    assert not client.streams
    assert not server.streams
    assert not near.was_reset


def test_a_header_list_above_the_announced_size_ends_the_connection():
    client, _ = an_established_pair()
    server = an_established_server(settings=HboneSettings(max_header_list_size=500))
    client.open([*CONNECT_HEADERS, (b"x", bytes(b"v" * 500))])
    with pytest.raises(TunnelError) as caught:
        server.receive(take(client))
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM
