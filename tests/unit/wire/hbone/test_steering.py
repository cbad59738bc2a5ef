from __future__ import annotations

import struct

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import PingFrame, RstStreamFrame, SettingsFrame

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
from ztunnel.wire.hbone.connection import HboneConnection, HboneSettings
from ztunnel.wire.hbone.events import (
    GoawayReceived,
    PingAcknowledged,
    SettingsReceived,
    WindowOpened,
)
from ztunnel.wire.hbone.frames import FrameKind


def settings(*entries: tuple[int, int]) -> bytes:
    return frame(4, 0, 0, b"".join(struct.pack(">HI", *each) for each in entries))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(8, 0, stream_id, struct.pack(">I", increment))


def reset(stream_id: int, code: int) -> bytes:
    return frame(3, 0, stream_id, struct.pack(">I", code))


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    return frame(7, 0, 0, struct.pack(">II", last, code) + debug)


def test_settings_are_applied_acknowledged_and_told():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    take(client)
    told = client.receive(memoryview(settings((3, 7), (4, 100_000), (5, 32_768), (1, 0), (6, 9))))
    assert told == [WindowOpened(near), SettingsReceived()]
    assert client.peer_max_concurrent_streams == 7
    assert client.peer_max_frame_size == 32_768
    assert near.send_window == 100_000
    (ack,) = frames_of(take(client))
    assert isinstance(ack, SettingsFrame)
    assert set(ack.flags) == {"ACK"}


def test_a_peer_that_names_no_stream_limit_has_none():
    client = HboneConnection(client=True)
    assert not client.settings_received
    assert client.peer_max_concurrent_streams == 100
    client.receive(memoryview(settings()))
    assert client.settings_received
    assert client.peer_max_concurrent_streams == 2**31 - 1


def test_later_settings_leave_the_stream_limit_as_it_was():
    client = HboneConnection(client=True)
    client.receive(memoryview(settings((3, 7)) + settings((5, 20_000))))
    assert client.peer_max_concurrent_streams == 7


def test_a_smaller_initial_window_may_leave_a_stream_in_debt():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    client.queue_data(near, bytes(50_000))
    assert client.receive(memoryview(settings((4, 10_000)))) == [SettingsReceived()]
    assert near.send_window == 10_000 - 50_000
    assert client.sendable(near) == 0
    assert client.receive(memoryview(window_update(near.id, 40_000))) == []
    assert client.receive(memoryview(window_update(near.id, 1))) == [WindowOpened(near)]
    assert client.sendable(near) == 1


def test_an_initial_window_that_overflows_a_stream_ends_the_connection():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    client.receive(memoryview(window_update(near.id, 2**31 - 1 - 65_535)))
    with pytest.raises(TunnelError) as caught:
        client.receive(memoryview(settings((4, 65_536))))
    assert caught.value.code == ErrorCodes.FLOW_CONTROL_ERROR


def test_a_finished_stream_is_not_told_of_windows():
    client = an_established_client()
    near = client.open(CONNECT_HEADERS)
    client.finish(near)
    assert client.receive(memoryview(settings((4, 100_000)))) == [SettingsReceived()]
    assert client.receive(memoryview(window_update(near.id, 5))) == []


def test_a_window_below_the_default_binds_the_peer_once_it_has_agreed():
    server = an_established_server(settings=HboneSettings(stream_window=1_000))
    client = an_established_client()
    client.open(CONNECT_HEADERS)
    (request,) = server.receive(take(client))
    assert request.stream.receive_window == 65_535
    server.receive(memoryview(frame(4, 1, 0)))
    assert request.stream.receive_window == 1_000
    data = memoryview(frame(0, 0, 1, bytes(1_001)))
    assert solid(server.receive(data)) == [("reset", 1, ErrorCodes.FLOW_CONTROL_ERROR, False)]


def test_a_ping_comes_back_with_the_same_bytes():
    client, server = an_established_pair()
    client.ping(b"12345678")
    assert server.receive(take(client)) == []
    answer = take(server)
    (pong,) = frames_of(answer)
    assert isinstance(pong, PingFrame)
    assert (pong.opaque_data, set(pong.flags)) == (b"12345678", {"ACK"})
    assert client.receive(answer) == [PingAcknowledged(b"12345678")]


def test_a_goaway_gives_back_only_the_streams_above_it():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    late = client.open(CONNECT_HEADERS)
    told = client.receive(memoryview(goaway(near.id, 2, b"bye")))
    assert told[0] == GoawayReceived(near.id, 2, b"bye") == client.goaway_received
    assert solid(told[1:]) == [("reset", late.id, ErrorCodes.REFUSED_STREAM, True)]
    assert client.draining
    assert list(client.streams) == [near.id]
    take(client)
    client.queue_data(near, b"still here")
    assert solid(server.receive(take(client))) == [("data", far.id, b"still here")]


def test_a_second_goaway_can_only_refuse_more():
    client = an_established_client()
    for _ in range(3):
        client.open(CONNECT_HEADERS)
    assert len(client.receive(memoryview(goaway(2**31 - 1)))) == 1
    assert len(client.receive(memoryview(goaway(3)))) == 2
    client.receive(memoryview(goaway(5)))
    assert client.goaway_received == GoawayReceived(3, 0, b"")
    assert list(client.streams) == [1, 3]


def test_a_clients_goaway_leaves_its_own_streams_alone():
    client, server = an_established_pair()
    a_tunnel(client, server)
    assert server.receive(memoryview(goaway(0))) == [GoawayReceived(0, 0, b"")]
    assert list(server.streams) == [1]
    assert server.draining


def test_a_reset_ends_the_stream_with_its_code():
    client, server = an_established_pair()
    _, far = a_tunnel(client, server)
    assert solid(server.receive(memoryview(reset(far.id, 0x1234)))) == [("reset", 1, 0x1234, True)]
    assert far.was_reset
    assert not server.streams


def test_frames_for_a_stream_that_is_over_are_ignored():
    client, server = an_established_pair()
    near, _ = a_tunnel(client, server)
    server.reset(server.streams[near.id], ErrorCodes.CANCEL)
    take(server)
    late = window_update(near.id, 5) + reset(near.id, 8) + reset(near.id, 8)
    assert server.receive(memoryview(late + frame(2, 0, near.id, bytes(5)))) == []
    assert not server.control


@pytest.mark.parametrize(
    ("increment", "code"),
    [(0, ErrorCodes.PROTOCOL_ERROR), (2**31 - 1, ErrorCodes.FLOW_CONTROL_ERROR)],
)
def test_a_wrong_stream_window_costs_the_stream_only(increment: int, code: int):
    client, server = an_established_pair()
    _, far = a_tunnel(client, server)
    assert solid(server.receive(memoryview(window_update(far.id, increment)))) == [
        ("reset", far.id, code, False)
    ]
    (sent,) = frames_of(take(server))
    assert isinstance(sent, RstStreamFrame)
    assert (sent.stream_id, sent.error_code) == (far.id, code)


def test_the_reserved_bit_of_a_window_update_is_ignored():
    server = an_established_server()
    before = server.send_window
    server.receive(memoryview(window_update(0, 2**31 + 5)))
    assert server.send_window == before + 5


def test_a_priority_of_a_wrong_size_costs_its_stream():
    client, server = an_established_pair()
    _, far = a_tunnel(client, server)
    assert solid(server.receive(memoryview(frame(2, 0, far.id, b"1234")))) == [
        ("reset", far.id, ErrorCodes.FRAME_SIZE_ERROR, False)
    ]


P = ErrorCodes.PROTOCOL_ERROR
S = ErrorCodes.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(frame(4, 0, 1), P, id="SETTINGS on a stream"),
        pytest.param(frame(4, 1, 0, bytes(6)), S, id="SETTINGS acknowledgement with a payload"),
        pytest.param(frame(6, 0, 1, bytes(8)), P, id="PING on a stream"),
        pytest.param(frame(6, 0, 0, bytes(7)), S, id="PING of seven bytes"),
        pytest.param(frame(7, 0, 1, bytes(8)), P, id="GOAWAY on a stream"),
        pytest.param(frame(7, 0, 0, bytes(7)), S, id="GOAWAY of seven bytes"),
        pytest.param(frame(3, 0, 1, bytes(3)), S, id="RST_STREAM of three bytes"),
        pytest.param(reset(0, 8), P, id="RST_STREAM on stream 0"),
        pytest.param(reset(9, 8), P, id="RST_STREAM on an idle stream"),
        pytest.param(reset(2, 8), P, id="RST_STREAM on an even stream"),
        pytest.param(frame(8, 0, 0, bytes(5)), S, id="WINDOW_UPDATE of five bytes"),
        pytest.param(window_update(0, 0), P, id="WINDOW_UPDATE of 0 on the connection"),
        pytest.param(
            window_update(0, 2**31 - 1), ErrorCodes.FLOW_CONTROL_ERROR, id="window overflow"
        ),
        pytest.param(window_update(9, 1), P, id="WINDOW_UPDATE on an idle stream"),
        pytest.param(frame(2, 0, 0, bytes(5)), P, id="PRIORITY on stream 0"),
        pytest.param(frame(2, 0, 9, bytes(4)), S, id="PRIORITY of four bytes, idle stream"),
        pytest.param(frame(5, 4, 1, bytes(4)), P, id="PUSH_PROMISE"),
    ],
)
def test_control_frames_that_may_not_be_end_the_connection(data: bytes, code: int):
    client, server = an_established_pair()
    a_tunnel(client, server)
    for end in (client, server):
        with pytest.raises(TunnelError) as caught:
            end.receive(memoryview(data))
        assert caught.value.code == code
        *_, last = frames_of(take(end))
        assert last.error_code == code


def test_frame_kinds_are_named_in_errors():
    with pytest.raises(TunnelError, match="PING of 7 bytes, not 8"):
        an_established_server().receive(memoryview(frame(FrameKind.PING, 0, 0, bytes(7))))
