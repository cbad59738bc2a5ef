from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ztunnel.transport.dispatch import STREAM_EVENTS
from ztunnel.wire.hbone.events import DataReceived, ResponseReceived, StreamEnded, StreamReset
from ztunnel.wire.hbone.stream import Stream


@dataclass
class Owner:
    heard: list[object] = field(default_factory=list)

    def on_data(self, event: DataReceived) -> None:
        self.heard.append(event.size)

    def on_end(self) -> None:
        self.heard.append("end")

    def on_reset(self, code: int) -> None:
        self.heard.append(code)

    def on_response(self, event: ResponseReceived) -> None:
        self.heard.append(event.status)


def a_stream() -> Stream:
    return Stream(1, send_window=1, receive_window=1, readable=True)


EVENTS = [
    (lambda stream: DataReceived(stream, [], 7), 7),
    (StreamEnded, "end"),
    (lambda stream: StreamReset(stream, 8), 8),
    (lambda stream: ResponseReceived(stream, 200, [], ended=False), 200),
]


@pytest.mark.parametrize(("make", "heard"), EVENTS)
def test_the_owner_of_a_stream_hears_what_happened(make, heard) -> None:
    stream = a_stream()
    stream.owner = owner = Owner()
    event = make(stream)
    STREAM_EVENTS[type(event)](None, event)
    assert owner.heard == [heard]


@pytest.mark.parametrize(("make", "heard"), EVENTS)
def test_what_happens_to_a_stream_that_nobody_owns_goes_nowhere(make, heard) -> None:
    event = make(a_stream())
    STREAM_EVENTS[type(event)](None, event)
    assert event.stream.owner is None
