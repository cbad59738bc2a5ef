"""The core against `h2` in memory; real servers are in transport/test_grpc_shared.py."""

from __future__ import annotations

from collections.abc import Sequence

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from ztunnel.errors import LimitError
from ztunnel.wire.grpc import GrpcCall
from ztunnel.wire.grpc_connection import GrpcConnection
from ztunnel.wire.hbone.frames import pack_goaway

HEAD = [(":status", "200"), ("content-type", "application/grpc")]


class Server:
    """The other end; it answers when it is told to."""

    def __init__(self, connection: GrpcConnection, **settings: int) -> None:
        self.connection = connection
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.h2.initiate_connection()
        self.h2.update_settings(
            {getattr(h2.settings.SettingCodes, name): value for name, value in settings.items()}
        )
        self.events: list[h2.events.Event] = []
        self.exchange()

    def exchange(self) -> None:
        """Carry bytes both ways until neither end has any."""
        while True:
            there, back = self.connection.data_to_send(), self.h2.data_to_send()
            if not there and not back:
                return
            self.events += self.h2.receive_data(there)
            self.connection.receive(memoryview(back))

    def heard(self, kind: type[h2.events.Event]) -> list[int]:
        return [event.stream_id for event in self.events if type(event) is kind]

    def answer(
        self, stream_id: int, message: bytes, trailers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.h2.send_headers(stream_id, HEAD)
        self.h2.send_data(stream_id, bytes([0, 0, 0, 0, len(message)]) + message)
        ending = trailers or [("grpc-status", "0")]
        self.h2.send_headers(stream_id, ending, end_stream=True)
        self.exchange()


def a_call(connection: GrpcConnection, message: bytes = b"x") -> GrpcCall:
    call = connection.open("ca.test:15012", "/a.B/C", [("authorization", "Bearer x")], seconds=2)
    call.send(message)
    call.finish()
    return call


def status_of(call: GrpcCall) -> str:
    assert call.is_over
    return call.failure.status if call.failure else "OK"


def test_each_call_gets_its_own_answer_in_any_order() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    calls = [a_call(connection) for _ in range(3)]
    server.exchange()
    assert server.heard(h2.events.RequestReceived) == [1, 3, 5]
    assert not connection.has_news
    for stream_id in (5, 1, 3):
        server.answer(stream_id, b"%d" % stream_id)
    assert connection.has_news
    assert [call.take() for call in calls] == [b"1", b"3", b"5"]
    assert [status_of(call) for call in calls] == ["OK"] * 3
    for call in calls:
        connection.release(call)
    assert not connection.calls
    assert not connection.has_more_to_send
    assert connection.takes_calls


def test_what_one_message_cannot_send_yet_waits_for_the_servers_window() -> None:
    connection = GrpcConnection()
    server = Server(connection, INITIAL_WINDOW_SIZE=10)
    a_call(connection, b"0123456789")
    a_call(connection, b"!")
    server.exchange()
    assert connection.has_more_to_send
    assert server.heard(h2.events.StreamEnded) == [3]
    server.h2.increment_flow_control_window(10, 1)
    server.exchange()
    assert server.heard(h2.events.StreamEnded) == [3, 1]
    assert not connection.has_more_to_send


def test_an_error_of_one_call_is_nobody_elses() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    refused, garbled, reset, fine = (a_call(connection) for _ in range(4))
    server.exchange()
    server.answer(1, b"", [("grpc-status", "16")])
    server.h2.send_headers(3, HEAD)
    server.h2.send_data(3, b"\1\0\0\0\0")
    server.h2.reset_stream(5, 11)
    server.answer(7, b"fine")
    assert status_of(refused) == "UNAUTHENTICATED"
    assert status_of(garbled) == "INTERNAL"
    assert status_of(reset) == "RESOURCE_EXHAUSTED"
    assert (fine.take(), status_of(fine)) == (b"fine", "OK")
    assert [call.is_unheard for call in (refused, garbled, reset, fine)] == [
        False,
        False,
        True,
        False,
    ]


def test_a_call_that_is_released_too_early_is_reset() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    given_up, kept = a_call(connection), a_call(connection)
    server.exchange()
    connection.release(given_up)
    server.exchange()
    assert server.heard(h2.events.StreamReset) == [1]
    server.answer(3, b"kept")
    assert kept.take() == b"kept"


def test_after_a_goaway_the_older_calls_go_on_and_the_newer_are_refused() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    older, newer = a_call(connection), a_call(connection)
    server.exchange()
    connection.receive(memoryview(pack_goaway(1, 0, b"bye")))
    assert not connection.takes_calls
    with pytest.raises(LimitError):
        a_call(connection)
    assert (status_of(newer), newer.is_unheard) == ("UNAVAILABLE", True)
    assert "bye" in str(newer.failure)
    connection.release(newer)
    assert not connection.is_over
    server.answer(1, b"older")
    assert older.take() == b"older"
    connection.release(older)
    assert connection.is_over


def test_a_goaway_ends_an_idle_connection() -> None:
    connection = GrpcConnection()
    Server(connection)
    connection.receive(memoryview(pack_goaway(0, 0, b"")))
    assert connection.is_over


def test_more_calls_than_the_server_takes_are_not_begun() -> None:
    connection = GrpcConnection()
    server = Server(connection, MAX_CONCURRENT_STREAMS=1)
    call = a_call(connection)
    with pytest.raises(LimitError):
        a_call(connection)
    assert list(connection.calls) == [call]
    server.exchange()
    server.answer(1, b"")
    connection.release(call)
    a_call(connection)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param(lambda c: c.close("gone"), "UNAVAILABLE", id="the connection is gone"),
        pytest.param(lambda c: c.receive(memoryview(b"\0" * 90)), "UNAVAILABLE", id="garbage"),
        pytest.param(lambda c: c.fail("CANCELLED", "the end"), "CANCELLED", id="we end"),
    ],
)
def test_what_ends_the_connection_ends_its_calls(end, status: str) -> None:
    connection = GrpcConnection()
    server = Server(connection)
    done, under_way = a_call(connection), a_call(connection)
    server.exchange()
    server.answer(1, b"done")
    end(connection)
    assert connection.is_over
    assert not connection.takes_calls
    assert connection.has_news
    assert (done.take(), status_of(done)) == (b"done", "OK")
    assert status_of(under_way) == status
    with pytest.raises(LimitError):
        a_call(connection)


def test_leaving_says_goodbye() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    a_call(connection)
    server.exchange()
    connection.leave()
    server.exchange()
    assert server.heard(h2.events.StreamReset) == [1]
    assert isinstance(server.events[-1], h2.events.ConnectionTerminated)


def test_a_ping_is_answered() -> None:
    connection = GrpcConnection()
    server = Server(connection)
    connection.ping()
    assert connection.has_more_to_send
    server.exchange()
    assert any(isinstance(event, h2.events.PingReceived) for event in server.events)
    assert connection.takes_calls
