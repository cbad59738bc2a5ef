"""Known attacks on HTTP/2, and the honest peers that look a little like them."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import pytest
from h2.errors import ErrorCodes
from hpack import Encoder

from tests.support.h2_oracle import (
    CONNECT_HEADERS,
    a_tunnel,
    an_established_pair,
    an_established_server,
    frame,
    take,
)
from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.events import RequestReceived

REQUEST = Encoder().encode([(name, value, True) for name, value in CONNECT_HEADERS])
READ = 65_536  # what one read of the shell may bring


def reset(stream_id: int) -> bytes:
    return frame(3, 0, stream_id, struct.pack(">I", 8))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(8, 0, stream_id, struct.pack(">I", increment))


def reads_until_calm(server: HboneConnection, flood: bytes) -> tuple[int, int]:
    """Feed a flood in reads, sending all replies; return how many were survived, and the end."""
    for number, start in enumerate(range(0, len(flood), READ)):
        try:
            server.receive(memoryview(flood)[start : start + READ])
        except TunnelError as error:
            return number, error.code
        take(server)
    pytest.fail("the flood was put up with")


def a_rapid_reset() -> Iterator[bytes]:
    for number in range(20_000):
        yield frame(1, 4, 2 * number + 3, REQUEST) + reset(2 * number + 3)


def malformed_requests() -> Iterator[bytes]:
    for number in range(20_000):
        yield frame(1, 4, 2 * number + 3, b"\x82")


def streams_made_to_be_reset() -> Iterator[bytes]:
    """CVE-2025-8671: provoke the server's own resets."""
    for number in range(20_000):
        stream_id = 2 * number + 3
        yield frame(1, 4, stream_id, REQUEST) + window_update(stream_id, 0)


@pytest.mark.parametrize(
    ("flood", "most"),
    [
        pytest.param(b"".join(a_rapid_reset()), 1, id="rapid reset"),
        pytest.param(b"".join(malformed_requests()), 1, id="malformed requests"),
        pytest.param(b"".join(streams_made_to_be_reset()), 1, id="made you reset"),
        pytest.param(frame(6, 0, 0, bytes(8)) * 50_000, 1, id="PING"),
        pytest.param(frame(6, 1, 0, bytes(8)) * 50_000, 1, id="PING answers"),
        pytest.param(frame(4, 0, 0) * 50_000, 0, id="SETTINGS"),
        pytest.param(
            frame(4, 0, 0, struct.pack(">HI", 4, 1) + struct.pack(">HI", 4, 2**30)) * 20_000,
            0,
            id="SETTINGS that move windows",
        ),
        pytest.param(frame(4, 1, 0) * 50_000, 0, id="SETTINGS answers"),
        pytest.param(frame(0, 0, 1) * 50_000, 1, id="empty DATA"),
        pytest.param(frame(0, 8, 1, b"\0") * 50_000, 1, id="empty padded DATA"),
        pytest.param(window_update(0, 1) * 50_000, 1, id="WINDOW_UPDATE of 1, connection"),
        pytest.param(window_update(1, 1) * 50_000, 1, id="WINDOW_UPDATE of 1, stream"),
        pytest.param(frame(2, 0, 99, bytes(5)) * 50_000, 1, id="PRIORITY"),
        pytest.param(frame(0x99, 0, 0) * 50_000, 1, id="unknown frames"),
        pytest.param(frame(7, 0, 0, bytes(8)) * 50_000, 1, id="GOAWAY"),
        pytest.param(reset(1) * 50_000, 1, id="RST_STREAM of one stream"),
        pytest.param(frame(1, 0, 3) + frame(9, 0, 3) * 50_000, 0, id="CONTINUATION"),
    ],
)
def test_a_flood_is_cut_off_after_few_reads(flood: bytes, most: int):
    client, server = an_established_pair()
    a_tunnel(client, server)
    reads, code = reads_until_calm(server, flood)
    assert reads <= most
    assert code == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_flood_of_requests_is_refused_without_keeping_anything():
    server = an_established_server()
    flood = b"".join(frame(1, 4, 2 * each + 1, REQUEST) for each in range(2_300))
    server.receive(memoryview(flood))
    assert len(server.streams) == server.limits.max_streams
    assert len(server.control) <= server.limits.max_reply_bytes
    assert len(server._reset_ids) <= 1024


def test_pings_may_go_on_for_ever_at_an_honest_pace():
    server = an_established_server()
    for _ in range(20_000):
        server.receive(memoryview(frame(6, 0, 0, bytes(8))))
        take(server)


def test_probes_that_connect_and_reset_may_go_on_for_ever():
    server = an_established_server()
    for number in range(5_000):
        stream_id = 2 * number + 1
        server.receive(memoryview(frame(1, 4, stream_id, REQUEST) + reset(stream_id)))


def test_a_full_house_may_be_cancelled_at_once():
    server = an_established_server()
    house = range(1, 2 * server.limits.max_streams, 2)
    assert all(
        isinstance(each, RequestReceived)
        for each in server.receive(
            memoryview(b"".join(frame(1, 4, each, REQUEST) for each in house))
        )
    )
    server.receive(memoryview(b"".join(reset(each) for each in house)))
    assert not server.streams


def test_many_answered_streams_may_be_reset_at_once():
    client, server = an_established_pair()
    client.peer_max_concurrent_streams = 400
    for _ in range(3):
        near = [client.open(CONNECT_HEADERS) for _ in range(400)]
        for request in server.receive(take(client)):
            server.respond(request.stream, 200)
        client.receive(take(server))
        for stream in near:
            client.reset(stream, ErrorCodes.CANCEL)
        server.receive(take(client))
    assert not server.streams


def test_credit_for_every_single_small_message_is_no_flood():
    client, server = an_established_pair()
    near, far = a_tunnel(client, server)
    for _ in range(20):
        for _ in range(1_000):
            client.queue_data(near, b"x")
        server.receive(take(client))
        credit = window_update(near.id, 1) + window_update(0, 1)
        client.receive(memoryview(credit * 1_000))
    assert far.receive_window == 4 * 2**20 - 20_000


def test_when_both_ends_reset_all_streams_at_once_neither_is_cut_off():
    client, server = an_established_pair()
    client.peer_max_concurrent_streams = 400
    for _ in range(10):
        near = [client.open(CONNECT_HEADERS) for _ in range(300)]
        for request in server.receive(take(client)):
            server.respond(request.stream, 200)
        client.receive(take(server))
        for stream in near:
            server.reset(server.streams[stream.id], ErrorCodes.CANCEL)
            client.reset(stream, ErrorCodes.CANCEL)
        to_client, to_server = take(server), take(client)
        client.receive(to_client)
        server.receive(to_server)
    assert not client.streams
    assert not server.streams


def test_a_peer_that_trickles_the_largest_frames_takes_little_memory():
    server = an_established_server()
    payload = memoryview(frame(1, 0, 1, bytes(60_000)))
    tracemalloc.start()
    try:
        for start in range(0, len(payload), 100):
            server.receive(payload[start : start + 100])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000
