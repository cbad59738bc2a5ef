"""What a connection tells its shell. Past tense; each names the stream it is about.

They are not frozen, unlike other events: they are made on the hot path, where a frozen dataclass
costs three times as much, and `DataReceived` grows while its frames are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ztunnel.wire.hbone.stream import Stream

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class SettingsReceived:
    """The peer's settings arrived and are in force; the first tells that it speaks HTTP/2."""


@dataclass(slots=True)
class RequestReceived:
    """Server: a well-formed request opened `stream`; its method need not be CONNECT."""

    stream: Stream
    headers: Headers


@dataclass(slots=True)
class ResponseReceived:
    """Client: the final answer. `ended` means that no DATA and no `StreamEnded` will follow."""

    stream: Stream
    status: int
    headers: Headers
    ended: bool


@dataclass(slots=True)
class DataReceived:
    """Payload: slices of the caller's buffer, valid until the caller reuses it.

    `size` is their total. Every byte must come back through `consume` when it has been taken.
    """

    stream: Stream
    chunks: list[memoryview]
    size: int


@dataclass(slots=True)
class StreamEnded:
    """The peer has finished its direction of `stream`; `trailers` if it said something to that."""

    stream: Stream
    trailers: Headers = field(default_factory=list)


@dataclass(slots=True)
class StreamReset:
    """`stream` is gone; `by_peer` is False when we reset it because the peer broke the protocol.

    REFUSED_STREAM also stands for "above the last stream of a GOAWAY": safe to try elsewhere.
    """

    stream: Stream
    code: int
    by_peer: bool = True


@dataclass(slots=True)
class WindowOpened:
    """There may be room to send again: on one stream, or on the connection when it is None."""

    stream: Stream | None


@dataclass(slots=True)
class PingAcknowledged:
    """The answer to a `ping` with the same eight bytes."""

    payload: bytes


@dataclass(slots=True)
class GoawayReceived:
    """The peer takes no more streams; those up to `last_stream_id` live on."""

    last_stream_id: int
    code: int
    debug: bytes


Event = (
    SettingsReceived
    | RequestReceived
    | ResponseReceived
    | DataReceived
    | StreamEnded
    | StreamReset
    | WindowOpened
    | PingAcknowledged
    | GoawayReceived
)
