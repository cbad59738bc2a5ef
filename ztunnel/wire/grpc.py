"""One gRPC call over HTTP/2, the client's end, without I/O.

The protocol is gRPC's "PROTOCOL-HTTP2": a POST whose body and answer are messages, each with five
bytes before it, and whose trailers say how it ended. A unary call is one that `finish`es after its
only message. HTTP/2 itself is the engine that carries tunnels, `wire.hbone`. A call has a
connection of its own, or shares one with others (`wire.grpc_connection`).

How it works: a message grows as its bytes come, so that however large it is, no step of that takes
long. One whole message waits to be taken; what comes behind it
stays as it came, and is not credited to the server, so that one window of it is all there can be.

Nothing that a server sends raises an exception: it ends the call, and `failure` says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final
from urllib.parse import unquote_to_bytes

from h2.errors import ErrorCodes

from ztunnel.errors import CallError, TunnelError
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.events import (
    DataReceived,
    Event,
    GoawayReceived,
    Headers,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from ztunnel.wire.hbone.settings import HboneSettings
from ztunnel.wire.headers import first_value

MESSAGE_BYTES_MAX: Final = 200 * 1024 * 1024  # the first response of a large mesh
# To take bytes apart is a third cheaper than a bytearray; a larger copy would hold others up.
COPY_BYTES: Final = 1024 * 1024
BLOCK_BYTES: Final = 64 * 1024  # of what waits behind a message
SEND_BYTES: Final = 64 * 1024  # of messages in one piece
STATUS_TEXT_CHARS: Final = 300
PING_PAYLOAD: Final = b"ztngrpc\0"

_PREFIX: Final = Struct(">BI")  # whether it is compressed, and the length
_HTTP_OK: Final = 200

# gRPC's status codes, in the order of their numbers.
STATUSES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)

# What an answer without a status of gRPC means ("http-grpc-status-mapping"); UNKNOWN else.
_OF_HTTP: Final[Mapping[int, str]] = {
    400: "INTERNAL",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
# What a reset means (PROTOCOL-HTTP2, "Errors"); INTERNAL else.
_OF_RESET: Final[Mapping[int, str]] = {
    ErrorCodes.REFUSED_STREAM: "UNAVAILABLE",
    ErrorCodes.CANCEL: "CANCELLED",
    ErrorCodes.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED",
    ErrorCodes.INADEQUATE_SECURITY: "PERMISSION_DENIED",
}


class GrpcCall:
    """One call; every method returns at once and does no I/O."""

    def __init__(
        self,
        authority: str,
        path: str,
        metadata: Sequence[tuple[str, str]],
        *,
        seconds: float | None = None,
        connection: HboneConnection | None = None,
    ) -> None:
        """Begin the call; `seconds` tells the server how long we are going to wait.

        Raises:
            LimitError: `connection`, which it is to share, takes no more calls.
        """
        self.failure: CallError | None = None
        self.is_over = False  # nothing more will come, though there may be a message to take
        self._connection = connection or HboneConnection(client=True, settings=HboneSettings())
        self._stream = self._connection.open(_request(authority, path, metadata, seconds))
        self._stream.owner = self
        self._outgoing: deque[memoryview] = deque()
        self._is_finished = False
        self._prefix = bytearray()
        self._message: bytearray | None = None
        self._is_garbled = False  # what comes from now on cannot be read
        self._size = 0  # of the message, once it is whole
        self._ready: bytearray | None = None
        self._behind: deque[bytearray] = deque()  # not one: to grow large is to be copied
        self._goaway = ""

    @property
    def has_news(self) -> bool:
        """Whether there is a message to take, or the call is over."""
        return self.is_over or self._ready is not None

    @property
    def is_unheard(self) -> bool:
        """Whether the server has said nothing to this call but, perhaps, that it refuses it."""
        return not self._stream.answered

    @property
    def has_more_to_send(self) -> bool:
        """Whether `data_to_send` has something, or will when the server allows it."""
        return bool(self._connection.control or self._outgoing)

    @property
    def waiting(self) -> int:
        """Return how many messages, or pieces of such, the server has not taken yet."""
        return len(self._outgoing)

    def send(self, *pieces: bytes) -> None:
        """Queue a message, given in pieces."""
        assert not self._is_finished
        first, *others = pieces
        prefix = _PREFIX.pack(0, sum(map(len, pieces)))
        self._outgoing.append(memoryview(prefix + first))
        self._outgoing.extend(memoryview(piece) for piece in others if piece)

    def finish(self) -> None:
        """Say that there are no more messages."""
        self._is_finished = True
        if not self._outgoing:
            self._connection.finish(self._stream)

    def ping(self) -> None:
        """Ask for a sign of life; any bytes are one."""
        self._connection.ping(PING_PAYLOAD)

    def data_to_send(self) -> bytes:
        """Take the next bytes to send, a piece of moderate size; empty if none may be sent now."""
        self.queue()
        taken, self._connection.control = self._connection.control, bytearray()
        return bytes(taken)

    def queue(self) -> None:
        """Put the next piece that may be sent behind what the connection has to send."""
        room = min(SEND_BYTES, self._connection.sendable(self._stream))
        while room and self._outgoing:
            part = self._outgoing.popleft()
            if len(part) > room:
                self._outgoing.appendleft(part[room:])
                part = part[:room]
            self._connection.queue_data(self._stream, part)
            room -= len(part)
            if self._is_finished and not self._outgoing:
                self._connection.finish(self._stream)

    def cancel(self) -> None:
        """Give the call up, and the connection with it."""
        self.give_up()
        self._connection.goaway()

    def give_up(self) -> None:
        """Want nothing more of the call; the server hears of it unless it is done."""
        self._end()

    def receive(self, data: memoryview) -> None:
        """Digest bytes from the server, cut anywhere."""
        try:
            for event in self._connection.receive(data):
                self.handle(event)
        except TunnelError as error:
            self.fail("UNAVAILABLE", f"the server breaks HTTP/2: {error}")

    def take(self) -> bytes | bytearray | None:
        """Take the next whole message, None if there is none (yet)."""
        message, self._ready = self._ready, None
        self._catch_up()
        self._check_end()
        return bytes(message) if message is not None and len(message) < COPY_BYTES else message

    def _catch_up(self) -> None:
        """Read what came behind a message that is taken now."""
        while self._behind and self._ready is None and not self._is_garbled:
            with memoryview(self._behind[0]) as block:
                size = self._digest(block)
            del self._behind[0][:size]
            if not self._behind[0]:
                self._behind.popleft()

    def close(self, reason: str = "the server closed the connection") -> None:
        """Take note that the connection is gone."""
        self.fail("UNAVAILABLE", f"{reason}{self._goaway}")

    def fail(self, status: str, text: str) -> None:
        """End the call with an error, unless it is over."""
        if not self.is_over:
            self.failure = call_error(status, text)
            self._end()

    def _end(self, code: int = ErrorCodes.CANCEL) -> None:
        self.is_over = True
        self._outgoing.clear()
        self._connection.reset(self._stream, code)

    def handle(self, event: Event) -> None:
        """Take note of what happened on the connection, to this call or to all of them."""
        match event:
            case DataReceived(_, chunks):
                for chunk in chunks:
                    self._feed(chunk)
            case ResponseReceived(_, status, headers, ended):
                self._on_response(status, headers, ended=ended)
            case StreamEnded(_, trailers):
                self._on_status(trailers)
            case StreamReset(_, code):
                meaning = _OF_RESET.get(code, "INTERNAL")
                self.fail(meaning, f"the server reset the call with code {code}{self._goaway}")
            case GoawayReceived(_, code, debug):
                text = debug[:STATUS_TEXT_CHARS].decode(errors="replace")
                self._goaway = f", after it said that it goes away (code {code}) {text}".rstrip()
            case _:
                pass

    def _on_response(self, status: int, headers: Headers, *, ended: bool) -> None:
        kind = first_value(headers, b"content-type") or b""
        is_grpc = kind.startswith(b"application/grpc")
        if ended and (is_grpc or first_value(headers, b"grpc-status") is not None):
            self._on_status(headers)
        elif status != _HTTP_OK:
            self.fail(_OF_HTTP.get(status, "UNKNOWN"), f"the server answered with HTTP {status}")
        elif not is_grpc:
            self.fail("UNKNOWN", f"the server does not speak gRPC, but {kind[:80]!r}")

    def _on_status(self, trailers: Headers) -> None:
        """End the call as the server says."""
        code = first_value(trailers, b"grpc-status")
        if code is None:
            self.fail("UNKNOWN", "the server ended the call without a status")
        elif code != b"0":
            message = unquote_to_bytes(first_value(trailers, b"grpc-message") or b"")
            self.fail(_status(code), message.decode(errors="replace"))
        else:
            self._end(ErrorCodes.NO_ERROR)
            self._check_end()

    def _check_end(self) -> None:
        """Take note of an end that is no good one after all."""
        if self.is_over and self.failure is None and self._ready is None and self._is_amid:
            text = "the server ended the call in the middle of a message"
            self.failure = call_error("INTERNAL", text)

    @property
    def _is_amid(self) -> bool:
        return bool(self._prefix) or self._message is not None

    def _feed(self, chunk: memoryview) -> None:
        """Take in bytes of the body."""
        rest = chunk[self._digest(chunk) :] if self._ready is None else chunk
        if rest and self._behind and len(self._behind[-1]) + len(rest) <= BLOCK_BYTES:
            self._behind[-1] += rest
        elif rest:
            self._behind.append(bytearray(rest))

    def _digest(self, data: memoryview) -> int:
        """Read up to the end of one message; return how many bytes that were."""
        position = 0
        while position < len(data) and self._ready is None and not self._is_garbled:
            if self._message is None:
                size = _PREFIX.size - len(self._prefix)
                self._prefix += data[position : position + size]
                position = min(position + size, len(data))
                self._begin_message()
            else:
                part = data[position : position + self._size - len(self._message)]
                self._message += part
                position += len(part)
            if self._message is not None and len(self._message) == self._size:
                self._ready, self._message = self._message, None
        self._connection.consume(self._stream, position)
        return position

    def _begin_message(self) -> None:
        """Make room for a message, once its length is known."""
        if len(self._prefix) < _PREFIX.size:
            return
        compressed, length = _PREFIX.unpack(self._prefix)
        self._is_garbled = bool(compressed) or length > MESSAGE_BYTES_MAX
        if compressed:
            self.fail("INTERNAL", "the server compressed a message, which we did not offer")
        elif length > MESSAGE_BYTES_MAX:
            self.fail(
                "RESOURCE_EXHAUSTED", f"a message of {length} bytes, over {MESSAGE_BYTES_MAX}"
            )
        else:
            # It grows as it comes, which for a large one means that the kernel moves its pages:
            # to have all of it at once, zeroed, would stop everything for as long as a copy.
            self._prefix.clear()
            self._message = bytearray()
            self._size = length


def call_error(status: str, text: str) -> CallError:
    """Make the error of a call; its text begins with the status."""
    return CallError(f"{status}: {text[:STATUS_TEXT_CHARS]}", status=status)


def _status(code: bytes) -> str:
    """Name a status; one that we do not know is UNKNOWN."""
    number = int(code) if code.isdigit() and len(code) <= len(str(len(STATUSES))) else -1
    return STATUSES[number] if 0 < number < len(STATUSES) else "UNKNOWN"


def _request(
    authority: str, path: str, metadata: Sequence[tuple[str, str]], seconds: float | None
) -> Headers:
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", path.encode("ascii")),
        (b":authority", authority.encode("ascii")),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"ztunnel"),
    ]
    if seconds is not None:
        headers.append((b"grpc-timeout", b"%dm" % round(seconds * 1000)))
    return headers + [(name.encode("ascii"), value.encode("ascii")) for name, value in metadata]
