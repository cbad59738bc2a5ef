"""The core against `h2` as the server, in memory; real servers are in transport/test_grpc.py."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, strategies as st

from ztunnel.wire import grpc as module
from ztunnel.wire.grpc import GrpcCall

HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
FINE = [("grpc-status", "0")]
WINDOW = 4 * 1024 * 1024


class Server:
    """The other end; it answers when it is told to."""

    def __init__(self, call: GrpcCall, *, window: int | None = None) -> None:
        self.call = call
        self.got = b""
        self.events: list[h2.events.Event] = []
        config = h2.config.H2Configuration(client_side=False, header_encoding="ascii")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.exchange()

    def exchange(self, cuts: Sequence[int] = ()) -> None:
        """Carry bytes both ways until neither end has any."""
        while True:
            there, back = self.call.data_to_send(), self.h2.data_to_send()
            if not there and not back:
                return
            for event in self.h2.receive_data(there):
                self.events.append(event)
                if isinstance(event, h2.events.DataReceived):
                    self.got += event.data
                    credit = event.flow_controlled_length
                    self.h2.acknowledge_received_data(credit, event.stream_id)
            edges = sorted({0, len(back), *(cut % (len(back) + 1) for cut in cuts)})
            for start, stop in pairwise(edges):
                self.call.receive(memoryview(back[start:stop]))

    def begin(self, headers: Sequence[tuple[str, str]] = HEADERS, *, ended: bool = False) -> None:
        self.h2.send_headers(1, headers, end_stream=ended)

    def body(self, data: bytes, cuts: Sequence[int] = ()) -> None:
        while data:
            room = min(self.h2.local_flow_control_window(1), self.h2.max_outbound_frame_size)
            assert room, "the client gives no credit"
            self.h2.send_data(1, data[:room])
            data = data[room:]
            self.exchange(cuts)

    def end(self, trailers: Sequence[tuple[str, str]] = FINE) -> None:
        self.h2.send_headers(1, trailers, end_stream=True)
        self.exchange()


def a_call(**options: float) -> GrpcCall:
    return GrpcCall("xds.test:15012", "/a.B/C", [("authorization", "Bearer x")], **options)


def framed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def test_the_request_is_what_grpc_asks_for() -> None:
    server = Server(a_call(seconds=1.5))
    request = next(e for e in server.events if isinstance(e, h2.events.RequestReceived))
    assert dict(request.headers or ()) == {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/a.B/C",
        ":authority": "xds.test:15012",
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "ztunnel",
        "grpc-timeout": "1500m",
        "authorization": "Bearer x",
    }


def test_requests_do_not_wait_for_the_answer_to_begin() -> None:
    call = a_call()
    call.send(b"first")
    call.send(b"")
    server = Server(call)
    assert server.got == framed(b"first") + framed(b"")
    assert call.waiting == 0


def test_a_request_may_come_in_pieces() -> None:
    call = a_call()
    call.send(b"", b"one", b"", b"two")
    assert Server(call).got == framed(b"onetwo")


def test_a_large_request_goes_out_as_the_server_makes_room() -> None:
    call = a_call()
    message = bytes(range(256)) * 2000
    server = Server(call, window=1000)
    call.send(message)
    call.finish()
    server.exchange()
    assert server.got == framed(message)
    assert any(isinstance(event, h2.events.StreamEnded) for event in server.events)


def test_no_piece_to_send_is_large() -> None:
    call = a_call()
    server = Server(call, window=2**30)
    server.h2.increment_flow_control_window(2**30)
    server.exchange()
    call.send(bytes(10**6))
    sizes = [len(piece) for piece in iter(call.data_to_send, b"")]
    assert sum(sizes) > 10**6
    assert max(sizes) < module.SEND_BYTES + 1000


@given(
    messages=st.lists(st.binary(max_size=40), max_size=8),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_messages_arrive_however_the_wire_cuts_them(messages: list[bytes], cuts: list[int]) -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.body(b"".join(framed(message) for message in messages), cuts)
    server.end()
    assert list(iter(call.take, None)) == messages
    assert call.is_over
    assert call.failure is None


def test_who_does_not_take_messages_holds_the_server_up() -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.body(framed(b"first"))
    message = framed(bytes(WINDOW // 2))
    server.body(message)
    server.body(message[: server.h2.local_flow_control_window(1)])
    assert server.h2.local_flow_control_window(1) == 0
    assert call.take() == b"first"
    assert call.take() == message[5:]
    server.exchange()
    assert server.h2.local_flow_control_window(1) > WINDOW // 2


def test_a_message_larger_than_the_window_passes() -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    message = bytes(3 * WINDOW)
    server.body(framed(message))
    assert call.take() == message


@pytest.mark.parametrize(
    ("trailers", "expected"),
    [
        ([("grpc-status", "16"), ("grpc-message", "who%20are you%3F")], "UNAUTHENTICATED: who are"),
        ([("grpc-status", "14"), ("grpc-message", "x" * 999)], "UNAVAILABLE: " + "x" * 300),
        ([("grpc-status", "99")], "UNKNOWN: "),
        ([("grpc-status", "-1")], "UNKNOWN: "),
        ([("x", "y")], "UNKNOWN: the server ended the call without a status"),
    ],
)
def test_trailers_say_how_it_ended(trailers: list[tuple[str, str]], expected: str) -> None:
    for only in (False, True):
        call = a_call()
        server = Server(call)
        if only:
            server.begin(HEADERS + trailers, ended=True)
            server.exchange()
        else:
            server.begin()
            server.body(framed(b"before"))
            server.end(trailers)
            assert call.take() == b"before"
        assert str(call.failure).startswith(expected)
        assert len(str(call.failure)) <= 320


def test_a_call_without_an_answer_may_be_fine() -> None:
    call = a_call()
    server = Server(call)
    server.begin(HEADERS + FINE, ended=True)
    server.exchange()
    assert (call.is_over, call.failure, call.take()) == (True, None, None)


@pytest.mark.parametrize(
    ("status", "expected"), [("404", "UNIMPLEMENTED"), ("503", "UNAVAILABLE"), ("301", "UNKNOWN")]
)
def test_an_answer_that_is_not_grpc_has_a_status_all_the_same(status: str, expected: str) -> None:
    for ended in (False, True):
        call = a_call()
        server = Server(call)
        server.begin([(":status", status), ("content-type", "text/html")], ended=ended)
        server.exchange()
        assert call.failure is not None
        assert (call.failure.status, status in str(call.failure)) == (expected, True)


def test_a_page_of_html_is_no_answer() -> None:
    call = a_call()
    server = Server(call)
    server.begin([(":status", "200"), ("content-type", "text/html")])
    server.exchange()
    assert "does not speak gRPC, but b'text/html'" in str(call.failure)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"\x01\0\0\0\x01x", "INTERNAL: the server compressed"),
        (b"\0\xff\0\0\0x", "RESOURCE_EXHAUSTED: a message of 4278190080 bytes"),
    ],
)
def test_a_message_that_we_cannot_take_ends_the_call(body: bytes, expected: str) -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.h2.send_data(1, body + b"more")
    server.exchange()
    assert str(call.failure).startswith(expected)
    assert any(isinstance(event, h2.events.StreamReset) for event in server.events)


@pytest.mark.parametrize("cut", [3, 7])
def test_an_end_in_the_middle_of_a_message_is_no_good_end(cut: int) -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.body(framed(b"hello")[:cut])
    server.end()
    assert str(call.failure) == "INTERNAL: the server ended the call in the middle of a message"


def test_what_came_before_the_end_is_taken_before_it_is_known() -> None:
    for trailers, failure in ((FINE, None), ([("grpc-status", "14")], "UNAVAILABLE: ")):
        call = a_call()
        server = Server(call)
        server.begin()
        server.body(framed(b"one") + framed(b"two") * 40_000)
        server.end(trailers)
        assert call.is_over
        assert [len(list(iter(call.take, None))), call.take()] == [40_001, None]
        assert (call.failure and str(call.failure)) == failure


def test_a_cut_behind_what_was_not_taken_yet_is_found_when_it_is() -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.body(framed(b"one") + framed(b"two")[:-1])
    server.end()
    assert call.failure is None
    assert call.take() == b"one"
    assert call.take() is None
    assert "in the middle of a message" in str(call.failure)


def test_a_body_that_ends_without_trailers_has_no_status() -> None:
    call = a_call()
    server = Server(call)
    server.begin()
    server.h2.end_stream(1)
    server.exchange()
    assert str(call.failure) == "UNKNOWN: the server ended the call without a status"


@pytest.mark.parametrize(
    ("code", "status"), [(8, "CANCELLED"), (7, "UNAVAILABLE"), (0, "INTERNAL"), (77, "INTERNAL")]
)
def test_a_reset_means_what_grpc_says(code: int, status: str) -> None:
    call = a_call()
    server = Server(call)
    server.h2.reset_stream(1, code)
    server.exchange()
    assert call.failure is not None
    assert call.failure.status == status


def test_a_connection_that_closes_is_unavailable_and_says_why_if_it_did() -> None:
    call = a_call()
    server = Server(call)
    server.h2.close_connection(additional_data=b"restart", last_stream_id=1)
    server.exchange()
    assert not call.is_over  # streams that were open may go on
    call.close()
    assert str(call.failure) == (
        "UNAVAILABLE: the server closed the connection, after it said that it goes away"
        " (code 0) restart"
    )


def test_a_connection_that_closes_after_the_end_changes_nothing() -> None:
    call = a_call()
    server = Server(call)
    server.begin(HEADERS + FINE, ended=True)
    server.exchange()
    call.close()
    assert call.failure is None


def test_giving_up_tells_the_server() -> None:
    call = a_call()
    server = Server(call)
    call.cancel()
    server.exchange()
    reset = next(e for e in server.events if isinstance(e, h2.events.StreamReset))
    assert reset.error_code == 8
    assert any(isinstance(event, h2.events.ConnectionTerminated) for event in server.events)


def test_a_ping_is_answered_and_asked() -> None:
    call = a_call()
    server = Server(call)
    call.ping()
    server.h2.ping(b"12345678")
    server.exchange()
    assert any(isinstance(event, h2.events.PingReceived) for event in server.events)
    assert any(isinstance(event, h2.events.PingAckReceived) for event in server.events)


@given(noise=st.binary(max_size=300), begun=st.booleans())
def test_noise_ends_the_call_or_does_nothing(noise: bytes, begun: bool) -> None:
    call = a_call()
    if begun:
        Server(call)
    call.receive(memoryview(noise))
    call.receive(memoryview(noise))
    assert call.failure is None or call.failure.status in {*module.STATUSES}
