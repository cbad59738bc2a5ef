from __future__ import annotations

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

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
from ztunnel.errors import LimitError
from ztunnel.wire.hbone.connection import DRAIN_PING, HboneConnection, HboneLimits, HboneSettings
from ztunnel.wire.hbone.frames import FrameKind

PREFACE_SIZE = 24


def test_a_client_begins_with_preface_settings_and_its_connection_window():
    opening = take(HboneConnection(client=True))
    assert opening[:PREFACE_SIZE] == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings, window = frames_of(opening[PREFACE_SIZE:])
    assert isinstance(settings, SettingsFrame)
    assert settings.settings == HboneSettings().announced(client=True)
    assert isinstance(window, WindowUpdateFrame)
    assert (window.stream_id, window.window_increment) == (0, 16 * 2**20 - 65_535)


def test_a_server_begins_with_settings():
    settings, _ = frames_of(take(HboneConnection(client=False)))
    assert settings.settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 200


def test_a_connection_window_of_the_default_size_needs_no_update():
    settings = HboneSettings(connection_window=65_535)
    (only,) = frames_of(take(HboneConnection(client=False, settings=settings)))
    assert isinstance(only, SettingsFrame)


def test_streams_are_numbered_oddly_and_begin_with_open_headers():
    client = an_established_client()
    assert [client.open(CONNECT_HEADERS).id for _ in range(3)] == [1, 3, 5]
    for each in frames_of(take(client)):
        assert isinstance(each, HeadersFrame)
        assert set(each.flags) == {"END_HEADERS"}


def test_a_client_may_open_before_the_peers_settings_up_to_the_assumed_limit():
    client = HboneConnection(client=True, limits=HboneLimits(assumed_peer_streams=2))
    client.open(CONNECT_HEADERS)
    client.open(CONNECT_HEADERS)
    with pytest.raises(LimitError, match="takes 2 streams"):
        client.open(CONNECT_HEADERS)


def test_a_finished_stream_makes_room_for_another():
    client, server = an_established_pair()
    client.peer_max_concurrent_streams = 1
    near, far = a_tunnel(client, server)
    with pytest.raises(LimitError):
        client.open(CONNECT_HEADERS)
    client.finish(near)
    server.finish(far)
    client.receive(take(server))
    assert client.open(CONNECT_HEADERS).id == 3


def test_stream_ids_run_out():
    client = an_established_client()
    client._next_id = 2**31 - 1
    assert client.open(CONNECT_HEADERS).id == 2**31 - 1
    with pytest.raises(LimitError, match="used up"):
        client.open(CONNECT_HEADERS)


def test_headers_larger_than_a_frame_are_continued():
    client = an_established_client()
    client.open([*CONNECT_HEADERS, (b"x", b"v" * 40_000)])
    first, second, third = frames_of(take(client))
    assert isinstance(first, HeadersFrame)
    assert not first.flags
    assert isinstance(second, ContinuationFrame)
    assert not second.flags
    assert set(third.flags) == {"END_HEADERS"}
    assert len(first.data) == len(second.data) == 16_384


def test_a_refusal_is_a_bare_status_and_a_reset_without_error():
    client, server = an_established_pair()
    client.open(CONNECT_HEADERS)
    (request,) = server.receive(take(client))
    server.refuse(request.stream, 401)
    sent = take(server)
    headers, reset = frames_of(sent)
    assert set(headers.flags) == {"END_HEADERS", "END_STREAM"}
    assert (reset.stream_id, reset.error_code) == (1, ErrorCodes.NO_ERROR)
    assert solid(client.receive(sent)) == [
        ("response", 1, 401, [(b":status", b"401")], True),
        ("reset", 1, 0, True),
    ]
    assert not server.streams
    assert not client.streams


def test_a_refusal_of_a_finished_request_needs_no_reset():
    client, server = an_established_pair()
    client.finish(client.open(CONNECT_HEADERS))
    request, _ = server.receive(take(client))
    server.refuse(request.stream, 503)
    (only,) = frames_of(take(server))
    assert isinstance(only, HeadersFrame)
    assert not server.streams


def test_an_answer_for_a_stream_the_peer_has_reset_is_swallowed():
    client, server = an_established_pair()
    near = client.open(CONNECT_HEADERS)
    (request,) = server.receive(take(client))
    client.reset(near, ErrorCodes.CANCEL)
    server.receive(take(client))
    server.respond(request.stream, 200)
    server.finish(request.stream)
    server.reset(request.stream, ErrorCodes.CANCEL)
    server.consume(request.stream, 4 * 2**20)
    assert server.sendable(request.stream) == 0
    assert not server.control


def test_queued_data_is_framed_and_charged():
    client, server = an_established_pair()
    near, _ = a_tunnel(client, server)
    before = client.send_window, near.send_window
    client.queue_data(near, memoryview(b"hello"))
    assert (client.send_window, near.send_window) == (before[0] - 5, before[1] - 5)
    (data,) = frames_of(take(client))
    assert isinstance(data, DataFrame)
    assert (data.stream_id, data.data, set(data.flags)) == (near.id, b"hello", set())


def test_queued_data_respects_the_peers_frame_size():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    take(client)
    client.queue_data(near, bytes(40_000))
    assert [len(each.data) for each in frames_of(take(client))] == [16_384, 16_384, 7_232]


@pytest.mark.parametrize(
    ("stream_window", "connection_window", "room"),
    [(10, 20, 10), (20, 10, 10), (-5, 20, 0), (0, 20, 0), (20, 0, 0)],
)
def test_room_to_send_is_the_smaller_window_and_never_negative(
    stream_window: int, connection_window: int, room: int
):
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    near.send_window, client.send_window = stream_window, connection_window
    assert client.sendable(near) == room


def test_there_is_no_room_on_a_finished_or_reset_stream():
    client = an_established_client()
    finished, reset = client.open(CONNECT_HEADERS), client.open(CONNECT_HEADERS)
    client.finish(finished)
    client.reset(reset, ErrorCodes.CANCEL)
    assert client.sendable(finished) == client.sendable(reset) == 0
    with pytest.raises(AssertionError):
        client.charge(finished, 1)


def test_finishing_twice_says_so_once():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    take(client)
    client.finish(near)
    client.finish(near)
    (data,) = frames_of(take(client))
    assert (data.data, set(data.flags)) == (b"", {"END_STREAM"})


def test_resetting_twice_says_so_once():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    take(client)
    client.reset(near, ErrorCodes.CANCEL)
    client.reset(near, ErrorCodes.CANCEL)
    (reset,) = frames_of(take(client))
    assert isinstance(reset, RstStreamFrame)
    assert reset.error_code == ErrorCodes.CANCEL
    assert near.was_reset


def test_credit_goes_back_once_a_quarter_of_the_window_is_owed():
    client, server = an_established_pair()
    _, far = a_tunnel(client, server)
    server.consume(far, 2**20 - 1)
    assert not server.control
    server.consume(far, 1)
    (update,) = frames_of(take(server))
    assert (update.stream_id, update.window_increment) == (far.id, 2**20)
    assert far.owed == 0


def test_no_credit_goes_back_once_the_peer_has_finished():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    client.finish(near)
    server.receive(take(client))
    server.consume(far, 4 * 2**20)
    assert not server.control


def test_a_drain_is_announced_then_sealed():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    server.begin_drain()
    warning, ping = frames_of(server.control)
    assert (warning.last_stream_id, warning.error_code) == (2**31 - 1, 0)
    assert isinstance(ping, PingFrame)
    late = client.open(CONNECT_HEADERS)  # before the warning is read
    assert solid(server.receive(take(client))) == [("request", late.id, CONNECT_HEADERS)]
    client.receive(take(server))
    with pytest.raises(LimitError, match="no more streams"):
        client.open(CONNECT_HEADERS)
    (acknowledged,) = server.receive(take(client))
    assert acknowledged.payload == DRAIN_PING
    server.finish_drain()
    (goaway,) = frames_of(take(server))
    assert isinstance(goaway, GoAwayFrame)
    assert goaway.last_stream_id == late.id
    assert far.id in server.streams
    assert client.sendable(near) > 0


def test_streams_opened_after_the_drain_are_refused_and_harm_nobody():
    client, server = an_established_pair()
    a_tunnel(client, server)
    late = client.open(CONNECT_HEADERS)
    server.finish_drain()
    take(server)
    assert server.receive(take(client)) == []
    assert solid(client.receive(take(server))) == [
        ("reset", late.id, ErrorCodes.REFUSED_STREAM, True)
    ]
    assert list(server.streams) == [1]


def test_a_goaway_never_takes_back_what_an_earlier_one_refused():
    server = an_established_server()
    server.goaway(last=3)
    server.goaway(last=7)
    assert [each.last_stream_id for each in frames_of(take(server))] == [3, 3]


def test_replies_the_peer_does_not_read_end_the_connection():
    server = an_established_server(limits=HboneLimits(max_reply_bytes=17 * 3))
    ping = memoryview(frame(FrameKind.PING, 0, 0, bytes(8)))
    for _ in range(10):
        server.receive(ping)
        take(server)
    for _ in range(3):
        server.receive(ping)
    with pytest.raises(Exception, match="too many replies"):
        server.receive(ping)


def test_reset_streams_are_remembered_but_not_without_end():
    client = an_established_client()
    client.peer_max_concurrent_streams = 10_000
    for stream in [client.open(CONNECT_HEADERS) for _ in range(3_000)]:
        client.reset(stream, ErrorCodes.CANCEL)
    assert len(client._reset_ids) == 1024
    assert next(reversed(client._reset_ids)) == 5_999
