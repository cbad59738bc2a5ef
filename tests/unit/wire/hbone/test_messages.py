from __future__ import annotations

import pytest
from h2.errors import ErrorCodes
from hpack import Encoder

from tests.support.h2_oracle import (
    CONNECT_HEADERS,
    a_tunnel,
    an_established_client,
    an_established_pair,
    an_established_server,
    frame,
    frames_of,
    solid,
    take,
)
from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.connection import HboneConnection, HboneLimits
from ztunnel.wire.hbone.events import Headers

HEADERS, CONTINUATION = 1, 9
END_STREAM, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 32
OK = [(b":status", b"200")]


def block(headers: Headers) -> bytes:
    """Encode without touching the table, so that blocks do not depend on each other."""
    return Encoder().encode([(name, value, True) for name, value in headers])


REQUEST = block(CONNECT_HEADERS)


def headers(stream_id: int, fields: Headers, flags: int = END_HEADERS) -> memoryview:
    return memoryview(frame(HEADERS, flags, stream_id, block(fields)))


def a_client_with_a_request() -> HboneConnection:
    client = an_established_client()
    client.open(CONNECT_HEADERS)
    take(client)
    return client


def code_of_failure(end: HboneConnection, data: bytes | memoryview) -> int:
    with pytest.raises(TunnelError) as caught:
        end.receive(memoryview(data))
    return caught.value.code


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        pytest.param(END_HEADERS, REQUEST, id="bare"),
        pytest.param(END_HEADERS | PADDED, b"\x03" + REQUEST + bytes(3), id="padded"),
        pytest.param(END_HEADERS | PADDED, b"\x00" + REQUEST, id="padded by nothing"),
        pytest.param(END_HEADERS | PRIORITY, b"\x80\0\0\0\x09" + REQUEST, id="with priority"),
        pytest.param(
            END_HEADERS | PRIORITY | PADDED,
            b"\xff" + bytes(5) + REQUEST + bytes(255),
            id="with priority and all the padding there is",
        ),
    ],
)
def test_a_request_opens_a_stream(flags: int, payload: bytes):
    server = an_established_server()
    assert solid(server.receive(memoryview(frame(HEADERS, flags, 1, payload)))) == [
        ("request", 1, CONNECT_HEADERS)
    ]
    assert list(server.streams) == [1]


def test_a_request_in_pieces_opens_a_stream():
    server = an_established_server()
    pieces = [REQUEST[:1], b"", REQUEST[1:20]]
    data = frame(HEADERS, 0, 1, pieces[0]) + b"".join(
        frame(CONTINUATION, 0, 1, piece) for piece in pieces[1:]
    )
    assert server.receive(memoryview(data)) == []
    rest = frame(CONTINUATION, END_HEADERS, 1, REQUEST[20:])
    assert solid(server.receive(memoryview(rest))) == [("request", 1, CONNECT_HEADERS)]


def test_a_request_may_end_its_direction_at_once():
    server = an_established_server()
    told = server.receive(headers(1, CONNECT_HEADERS, END_HEADERS | END_STREAM))
    assert solid(told) == [("request", 1, CONNECT_HEADERS), ("ended", 1)]
    assert server.sendable(server.streams[1]) > 0


def test_a_request_of_another_method_is_the_shells_to_refuse():
    server = an_established_server()
    get: Headers = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/")]
    assert solid(server.receive(headers(1, get))) == [("request", 1, get)]


def test_a_malformed_request_costs_its_stream_only():
    server = an_established_server()
    assert server.receive(headers(1, [*CONNECT_HEADERS, (b"Upper", b"x")])) == []
    (reset,) = frames_of(take(server))
    assert (reset.stream_id, reset.error_code) == (1, ErrorCodes.PROTOCOL_ERROR)
    assert solid(server.receive(headers(3, CONNECT_HEADERS))) == [("request", 3, CONNECT_HEADERS)]


def test_streams_over_the_limit_are_refused_one_by_one():
    server = an_established_server(limits=HboneLimits(max_streams=2))
    for stream_id in (1, 3):
        server.receive(headers(stream_id, CONNECT_HEADERS))
    assert server.receive(headers(5, CONNECT_HEADERS)) == []
    (reset,) = frames_of(take(server))
    assert (reset.stream_id, reset.error_code) == (5, ErrorCodes.REFUSED_STREAM)
    assert list(server.streams) == [1, 3]


def test_a_refused_request_still_changes_the_header_table():
    client, server = an_established_pair()
    server.limits = HboneLimits(max_streams=0)
    client.open([*CONNECT_HEADERS, (b"x", b"remembered")])
    server.receive(take(client))
    server.limits = HboneLimits()
    client.open([*CONNECT_HEADERS, (b"x", b"remembered")])
    (request,) = server.receive(take(client))
    assert request.headers == [*CONNECT_HEADERS, (b"x", b"remembered")]


def test_trailers_end_the_stream():
    client, server = an_established_pair()
    a_tunnel(client, server)
    flags = END_HEADERS | END_STREAM
    assert solid(server.receive(headers(1, [(b"x", b"y")], flags))) == [("ended", 1)]
    assert solid(client.receive(headers(1, [(b"x", b"y")], flags))) == [("ended", 1)]


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        pytest.param([(b"x", b"y")], END_HEADERS, id="that end nothing"),
        pytest.param(OK, END_HEADERS | END_STREAM, id="with a pseudo field"),
    ],
)
def test_trailers_that_may_not_be_cost_the_stream(fields: Headers, flags: int):
    client, server = an_established_pair()
    a_tunnel(client, server)
    assert solid(server.receive(headers(1, fields, flags))) == [
        ("reset", 1, ErrorCodes.PROTOCOL_ERROR, False)
    ]


def test_trailers_after_the_end_cost_the_stream():
    client, server = an_established_pair()
    near, _ = a_tunnel(client, server)
    client.finish(near)
    server.receive(take(client))
    assert solid(server.receive(headers(1, [(b"x", b"y")], END_HEADERS | END_STREAM))) == [
        ("reset", 1, ErrorCodes.STREAM_CLOSED, False)
    ]


def test_interim_responses_are_passed_over():
    client = a_client_with_a_request()
    assert client.receive(headers(1, [(b":status", b"103"), (b"link", b"x")])) == []
    assert solid(client.receive(headers(1, OK))) == [("response", 1, 200, OK, False)]


def test_a_response_may_end_the_stream_and_says_so_once():
    client = a_client_with_a_request()
    client.finish(client.streams[1])
    no = [(b":status", b"503")]
    assert solid(client.receive(headers(1, no, END_HEADERS | END_STREAM))) == [
        ("response", 1, 503, no, True)
    ]
    assert not client.streams


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        pytest.param([(b"x", b"y")], END_HEADERS, id="without a status"),
        pytest.param([(b":status", b"101")], END_HEADERS, id="switching protocols"),
        pytest.param([(b":status", b"103")], END_HEADERS | END_STREAM, id="interim and last"),
    ],
)
def test_a_malformed_response_costs_its_stream_only(fields: Headers, flags: int):
    client = a_client_with_a_request()
    assert solid(client.receive(headers(1, fields, flags))) == [
        ("reset", 1, ErrorCodes.PROTOCOL_ERROR, False)
    ]


def test_a_late_response_to_a_stream_we_reset_is_passed_over():
    client = a_client_with_a_request()
    client.reset(client.streams[1], ErrorCodes.CANCEL)
    take(client)
    assert client.receive(headers(1, OK)) == []
    assert not client.control


def test_late_responses_to_more_streams_than_we_remember_are_passed_over():
    client = a_client_with_a_request()
    client.reset(client.streams[1], ErrorCodes.CANCEL)
    client._reset_ids.clear()
    assert client.receive(headers(1, OK)) == []


def test_late_trailers_of_a_stream_the_server_reset_are_passed_over():
    client, server = an_established_pair()
    _, far = a_tunnel(client, server)
    server.reset(far, ErrorCodes.CANCEL)
    take(server)
    assert server.receive(headers(1, [(b"x", b"y")], END_HEADERS | END_STREAM)) == []
    assert not server.control


P = ErrorCodes.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(frame(HEADERS, 4, 0, REQUEST), P, id="HEADERS on stream 0"),
        pytest.param(frame(HEADERS, 4, 4, REQUEST), P, id="a request on an even stream"),
        pytest.param(frame(HEADERS, 4, 1, REQUEST), ErrorCodes.STREAM_CLOSED, id="used number"),
        pytest.param(frame(HEADERS, 12, 5, b"\x05abcd"), P, id="more padding than room"),
        pytest.param(frame(HEADERS, 12, 5), ErrorCodes.FRAME_SIZE_ERROR, id="no padding length"),
        pytest.param(
            frame(HEADERS, 36, 5, b"1234"), ErrorCodes.FRAME_SIZE_ERROR, id="no room for priority"
        ),
        pytest.param(frame(HEADERS, 4, 5, b"\x80"), ErrorCodes.COMPRESSION_ERROR, id="HPACK"),
        pytest.param(frame(CONTINUATION, 4, 5, b""), P, id="CONTINUATION of nothing"),
        pytest.param(
            frame(HEADERS, 0, 5, b"") + frame(CONTINUATION, 4, 7, b""), P, id="of another stream"
        ),
        pytest.param(frame(HEADERS, 0, 5, b"") + frame(6, 0, 0, bytes(8)), P, id="PING between"),
        pytest.param(frame(HEADERS, 0, 5, b"") + frame(0, 0, 3, b"x"), P, id="DATA between"),
        pytest.param(frame(HEADERS, 0, 5, b"") + frame(0x77, 0, 0), P, id="unknown between"),
        pytest.param(
            frame(HEADERS, 0, 5, b"") + frame(CONTINUATION, 0, 5, b"x") * 9,
            ErrorCodes.ENHANCE_YOUR_CALM,
            id="CONTINUATION flood",
        ),
        pytest.param(
            frame(HEADERS, 0, 5, bytes(60_000)) + frame(CONTINUATION, 0, 5, bytes(6_000)),
            ErrorCodes.ENHANCE_YOUR_CALM,
            id="a block too large",
        ),
    ],
)
def test_header_frames_that_may_not_be_end_the_connection(data: bytes, code: int):
    server = an_established_server()
    server.receive(headers(1, CONNECT_HEADERS))
    server.receive(headers(3, CONNECT_HEADERS))
    server.refuse(server.streams[1], 503)
    server._reset_ids.clear()
    assert code_of_failure(server, data) == code


@pytest.mark.parametrize("stream_id", [2, 3])
def test_a_server_may_not_open_streams(stream_id: int):
    client = a_client_with_a_request()
    assert code_of_failure(client, headers(stream_id, OK)) == P
