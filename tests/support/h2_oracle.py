"""Both ends of an HBONE connection for tests: ours, and `h2` as the oracle of what bytes mean.

`Ours` and `Oracle` have the same methods, so that a conversation can be scripted without saying
who speaks. Each keeps what it heard per stream; `window_views` compare both ends' bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived as H2DataReceived,
    Event as H2Event,
    PingAckReceived,
    RequestReceived as H2RequestReceived,
    ResponseReceived as H2ResponseReceived,
    StreamEnded as H2StreamEnded,
    StreamReset as H2StreamReset,
)
from h2.settings import SettingCodes
from hyperframe.frame import Frame, GoAwayFrame

from ztunnel.wire.hbone.connection import HboneConnection, HboneLimits, HboneSettings
from ztunnel.wire.hbone.events import (
    DataReceived,
    Event,
    GoawayReceived,
    Headers,
    PingAcknowledged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from ztunnel.wire.hbone.stream import Stream

CONNECT_HEADERS: Headers = [
    (b":method", b"CONNECT"),
    (b":authority", b"10.0.0.1:8080"),
    (b"baggage", b"k8s.namespace.name=shop"),
]


def take(connection: HboneConnection) -> memoryview:
    """Take what it wants sent, as the shell does."""
    out, connection.control = connection.control, bytearray()
    return memoryview(bytes(out))


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Print any frame, also a wrong one; written apart from the code under test."""
    return (
        len(payload).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream_id.to_bytes(4, "big")
        + payload
    )


def frames_of(data: bytes | memoryview) -> list[Frame]:
    """Parse a sequence of frames with hyperframe."""
    rest = memoryview(data)
    found = []
    while rest:
        each, length = Frame.parse_frame_header(rest[:9])
        each.parse_body(rest[9 : 9 + length])
        found.append(each)
        rest = rest[9 + length :]
    return found


def an_established_server(
    *, settings: HboneSettings | None = None, limits: HboneLimits | None = None
) -> HboneConnection:
    """Make a server that has read a client's preface and empty SETTINGS, and has no output left."""
    server = HboneConnection(client=False, settings=settings, limits=limits)
    server.receive(memoryview(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)))
    take(server)
    return server


def an_established_client(
    *, settings: HboneSettings | None = None, limits: HboneLimits | None = None
) -> HboneConnection:
    """Make a client that has read a server's empty SETTINGS, and has no output left."""
    client = HboneConnection(client=True, settings=settings, limits=limits)
    client.receive(memoryview(frame(4, 0, 0)))
    take(client)
    return client


def an_established_pair() -> tuple[HboneConnection, HboneConnection]:
    """Make a client and a server of ours that know each other's settings."""
    client, server = HboneConnection(client=True), HboneConnection(client=False)
    for _ in range(2):
        server.receive(take(client))
        client.receive(take(server))
    return client, server


def a_tunnel(client: HboneConnection, server: HboneConnection) -> tuple[Stream, Stream]:
    """Open a stream and accept it; return both ends of it."""
    near = client.open(CONNECT_HEADERS)
    (event,) = server.receive(take(client))
    assert isinstance(event, RequestReceived)
    server.respond(event.stream, 200)
    client.receive(take(server))
    return near, event.stream


def solid(events: Iterable[Event]) -> list[object]:
    """Make events comparable: without identity of streams, DATA joined over reads."""
    found: list[object] = []
    for event in events:
        match event:
            case DataReceived(stream, chunks, size):
                body = b"".join(chunks)
                assert len(body) == size
                last = found[-1] if found else None
                if isinstance(last, tuple) and last[:2] == ("data", stream.id):
                    found[-1] = ("data", stream.id, last[2] + body)
                else:
                    found.append(("data", stream.id, body))
            case RequestReceived(stream, headers):
                found.append(("request", stream.id, headers))
            case ResponseReceived(stream, status, headers, ended):
                found.append(("response", stream.id, status, headers, ended))
            case StreamEnded(stream):
                found.append(("ended", stream.id))
            case StreamReset(stream, code, by_peer):
                found.append(("reset", stream.id, code, by_peer))
            case _:
                found.append(repr(event))
    return found


def cut(data: bytes | memoryview, cuts: Iterable[int]) -> list[memoryview]:
    """Cut bytes into pieces at arbitrary places."""
    edges = sorted({0, len(data), *(each % (len(data) + 1) for each in cuts)})
    return [memoryview(data)[start:stop] for start, stop in pairwise(edges)]


@dataclass(slots=True)
class Heard:
    """What one end heard on one stream."""

    headers: Headers = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None


class Ours:
    """An end made of the code under test; it takes what it is given at once."""

    def __init__(self, *, client: bool) -> None:
        self.connection = HboneConnection(client=client)
        self.known: dict[int, Stream] = {}
        self.heard: dict[int, Heard] = {}
        self.pings: list[bytes] = []
        self.told_to_go = False

    def open(self, headers: Headers) -> int:
        stream = self.connection.open(headers)
        self.known[stream.id] = stream
        self.heard[stream.id] = Heard()
        return stream.id

    def respond(self, stream_id: int, status: int) -> None:
        self.connection.respond(self.known[stream_id], status)

    def refuse(self, stream_id: int, status: int) -> None:
        self.connection.refuse(self.known[stream_id], status)

    def room(self, stream_id: int) -> int:
        return self.connection.sendable(self.known[stream_id])

    def send(self, stream_id: int, payload: bytes) -> None:
        self.connection.queue_data(self.known[stream_id], payload)

    def finish(self, stream_id: int) -> None:
        self.connection.finish(self.known[stream_id])

    def reset(self, stream_id: int, code: int) -> None:
        self.connection.reset(self.known[stream_id], code)

    def ping(self, payload: bytes) -> None:
        self.connection.ping(payload)

    def goaway(self) -> None:
        self.connection.goaway()

    def is_live(self, stream_id: int) -> bool:
        return stream_id in self.connection.streams

    def has_finished(self, stream_id: int) -> bool:
        return self.known[stream_id].local_ended

    def take(self) -> bytes:
        return bytes(take(self.connection))

    def receive(self, data: memoryview) -> None:
        for event in self.connection.receive(data):
            self._hear(event)

    def _hear(self, event: Event) -> None:
        match event:
            case RequestReceived(stream, headers):
                self.known[stream.id] = stream
                self.heard[stream.id] = Heard(headers=headers)
            case ResponseReceived(stream, _, headers, ended):
                self.heard[stream.id].headers = headers
                self.heard[stream.id].ended = ended
            case DataReceived(stream, chunks, size):
                for chunk in chunks:
                    self.heard[stream.id].body += chunk
                self.connection.consume(stream, size)
            case StreamEnded(stream):
                self.heard[stream.id].ended = True
            case StreamReset(stream, code):
                self.heard[stream.id].reset = code
            case PingAcknowledged(payload):
                self.pings.append(payload)
            case GoawayReceived():
                self.told_to_go = True
            case _:
                pass

    def send_views(self, streams: Iterable[int]) -> list[int]:
        """Return what we believe we may send: connection first, then each stream."""
        return [self.connection.send_window] + [self.known[each].send_window for each in streams]

    def receive_views(self, streams: Iterable[int]) -> list[int]:
        """Return what we believe the peer may send: connection first, then each stream."""
        return [self.connection._receive_window] + [
            self.known[each].receive_window for each in streams
        ]


class LastingH2Connection(H2Connection):
    """h2 closes everything on GOAWAY; tunnels outlive it, so record it instead."""

    told_to_go = False

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[H2Event]]:
        self.told_to_go = True
        return [], []


class Oracle:
    """An end made of h2, set up as the reference's (dataplane.md 6.1)."""

    def __init__(self, *, client: bool) -> None:
        self.connection = LastingH2Connection(
            H2Configuration(client_side=client, header_encoding=None)
        )
        self.heard: dict[int, Heard] = {}
        self.pings: list[bytes] = []
        self._finished: set[int] = set()
        self._gone: set[int] = set()
        self.connection.initiate_connection()
        self.connection.increment_flow_control_window(16 * 2**20 - 65_535)

    @property
    def told_to_go(self) -> bool:
        return self.connection.told_to_go

    def open(self, headers: Headers) -> int:
        stream_id = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream_id, headers)
        self.heard[stream_id] = Heard()
        return stream_id

    def respond(self, stream_id: int, status: int) -> None:
        self.connection.send_headers(stream_id, [(b":status", b"%d" % status)])

    def refuse(self, stream_id: int, status: int) -> None:
        self.connection.send_headers(stream_id, [(b":status", b"%d" % status)], end_stream=True)
        if not self.heard[stream_id].ended:
            self.connection.reset_stream(stream_id, 0)
        self._gone.add(stream_id)

    def room(self, stream_id: int) -> int:
        if not self.is_live(stream_id) or self.has_finished(stream_id):
            return 0
        return max(0, self.connection.local_flow_control_window(stream_id))

    def send(self, stream_id: int, payload: bytes) -> None:
        limit = self.connection.max_outbound_frame_size
        for start in range(0, len(payload), limit):
            self.connection.send_data(stream_id, payload[start : start + limit])

    def finish(self, stream_id: int) -> None:
        self.connection.end_stream(stream_id)
        self._finished.add(stream_id)

    def reset(self, stream_id: int, code: int) -> None:
        self.connection.reset_stream(stream_id, code)
        self._gone.add(stream_id)

    def ping(self, payload: bytes) -> None:
        self.connection.ping(payload)

    def goaway(self) -> None:
        last = self.connection.highest_inbound_stream_id
        self.connection._prepare_for_sending([GoAwayFrame(0, last_stream_id=last)])

    def resize_windows(self, size: int) -> None:
        self.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: size})

    def is_live(self, stream_id: int) -> bool:
        heard = self.heard[stream_id]
        both = heard.ended and stream_id in self._finished
        return stream_id not in self._gone and heard.reset is None and not both

    def has_finished(self, stream_id: int) -> bool:
        return stream_id in self._finished

    def take(self) -> bytes:
        return self.connection.data_to_send()

    def receive(self, data: memoryview) -> None:
        for event in self.connection.receive_data(bytes(data)):
            self._hear(event)

    def _hear(self, event: object) -> None:
        match event:
            case H2RequestReceived():
                self.heard[event.stream_id] = Heard(headers=list(event.headers))
            case H2ResponseReceived():
                self.heard[event.stream_id].headers = list(event.headers)
            case H2DataReceived():
                self.heard[event.stream_id].body += event.data
                size = event.flow_controlled_length
                self.connection.acknowledge_received_data(size, event.stream_id)
            case H2StreamEnded():
                self.heard[event.stream_id].ended = True
            case H2StreamReset():
                self.heard[event.stream_id].reset = int(event.error_code)
            case PingAckReceived():
                self.pings.append(event.ping_data)
            case _:
                pass

    def send_views(self, streams: Iterable[int]) -> list[int]:
        return [self.connection.outbound_flow_control_window] + [
            self.connection.streams[each].outbound_flow_control_window for each in streams
        ]

    def receive_views(self, streams: Iterable[int]) -> list[int]:
        return [self.connection._inbound_flow_control_window_manager.current_window_size] + [
            self.connection.streams[each]._inbound_window_manager.current_window_size
            for each in streams
        ]
