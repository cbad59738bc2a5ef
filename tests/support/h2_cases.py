"""What may be wrong with HTTP/2 frames, and what RFC 9113 has the other end do about it.

The cases follow the sections that h2spec follows, for a server that knows CONNECT only, and a few
for the client of such a server. `RawPeer.verdict` says how outcomes are spelled.
"""

from __future__ import annotations

from typing import NamedTuple

from h2.settings import SettingCodes

from tests.support.raw_hbone import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    Fields,
    block,
    frame,
    number,
    setting,
)

AUTHORITY = "10.244.1.10:8081"  # an application that neither reads nor says anything
GREETING = PREFACE + frame(SETTINGS)
CONNECT: Fields = [(":method", "CONNECT"), (":authority", AUTHORITY)]
HALF_OPEN = END_HEADERS | END_STREAM

MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65_535
MIB = 1024 * 1024
STREAM_WINDOW = 4 * MIB  # ours, dataplane.md 6.1
MAX_FRAME = 1 * MIB
SMALLEST_MAX_FRAME = 16_384

UNKNOWN_KIND, UNKNOWN_FLAGS, UNKNOWN_SETTING = 0xFE, 0xF2, 0xFEFE
RESERVED_BIT = 0x8000_0000
BROKEN_BLOCK = b"\x80"  # RFC 7541 s6.1: index 0 is none

PROTOCOL, FLOW, SIZE, CLOSED, CALM, COMPRESSION = (
    "GOAWAY PROTOCOL_ERROR",
    "GOAWAY FLOW_CONTROL_ERROR",
    "GOAWAY FRAME_SIZE_ERROR",
    "GOAWAY STREAM_CLOSED",
    "GOAWAY ENHANCE_YOUR_CALM",
    "GOAWAY COMPRESSION_ERROR",
)
STREAM_PROTOCOL, STREAM_FLOW, STREAM_SIZE, STREAM_CLOSED = (
    "RST PROTOCOL_ERROR",
    "RST FLOW_CONTROL_ERROR",
    "RST FRAME_SIZE_ERROR",
    "RST STREAM_CLOSED",
)
TOLERATED = "tolerated"


class Case(NamedTuple):
    """Bytes to send, and what must come of it."""

    name: str
    data: bytes
    outcome: str


def request(stream_id: int = 1, fields: Fields = CONNECT, *, flags: int = END_HEADERS) -> bytes:
    """Print HEADERS."""
    return frame(HEADERS, flags, stream_id, block(fields))


def a_request(name: str, outcome: str, *fields: tuple[str, str]) -> Case:
    return Case(name, request(fields=list(fields)), outcome)


def settings(code: int, value: int) -> bytes:
    return frame(SETTINGS, payload=setting(code, value))


def priority(depends_on: int) -> bytes:
    return number(depends_on) + bytes([15])


# Instead of the greeting.
STRANGE_GREETINGS = [
    Case("3.4 HTTP/1.1 instead of the preface", b"GET / HTTP/1.1\r\nHost: cart\r\n\r\n", PROTOCOL),
    Case("3.4 a PING before SETTINGS", PREFACE + frame(PING, payload=bytes(8)), PROTOCOL),
    Case("3.4 SETTINGS that acknowledge come first", PREFACE + frame(SETTINGS, ACK), PROTOCOL),
]

# After the greeting; no stream is open.
ON_IDLE = [
    Case("4.1 a frame of an unknown kind", frame(UNKNOWN_KIND, payload=b"?" * 8), TOLERATED),
    Case(
        "4.1 undefined flags", frame(PING, UNKNOWN_FLAGS & ~ACK, payload=bytes(8)), TOLERATED
    ),
    Case("4.1 the reserved bit", frame(PING, 0, RESERVED_BIT, bytes(8)), TOLERATED),
    Case("4.2 a frame above our maximum", frame(DATA, 0, 1, length=MAX_FRAME + 1), SIZE),
    Case("4.2 a header block too large", frame(HEADERS, 0, 1, length=MAX_FRAME), CALM),
    Case("4.3 a broken header block", frame(HEADERS, END_HEADERS, 1, BROKEN_BLOCK), COMPRESSION),
    Case("4.3 PRIORITY inside a block", request(flags=0) + frame(PRIORITY, 0, 1, priority(0)),
         PROTOCOL),
    Case("4.3 HEADERS inside a block", request(flags=0) + request(3), PROTOCOL),
    Case("4.3 an unknown frame inside a block", request(flags=0) + frame(UNKNOWN_KIND), PROTOCOL),
    Case("5.1 DATA on an idle stream", frame(DATA, 0, 1, b"?"), PROTOCOL),
    Case("5.1 RST_STREAM on an idle stream", frame(RST_STREAM, 0, 1, number(8)), PROTOCOL),
    Case("5.1 WINDOW_UPDATE on an idle stream", frame(WINDOW, 0, 1, number(1)), PROTOCOL),
    Case("5.1 CONTINUATION on an idle stream", frame(CONTINUATION, 0, 1), PROTOCOL),
    Case("5.1 PRIORITY on an idle stream", frame(PRIORITY, 0, 1, priority(0)), TOLERATED),
    Case("5.1.1 an even stream", request(2), PROTOCOL),
    Case("5.3 a stream that depends on itself",
         frame(HEADERS, END_HEADERS | PRIORITISED, 1, priority(1) + block(CONNECT)), TOLERATED),
    Case("5.3 PRIORITY that depends on itself", frame(PRIORITY, 0, 1, priority(1)), TOLERATED),
    Case("6.1 DATA on stream 0", frame(DATA, 0, 0, b"?"), PROTOCOL),
    Case("6.2 HEADERS on stream 0", request(0), PROTOCOL),
    Case("6.2 HEADERS with more padding than room",
         frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + block(CONNECT)), PROTOCOL),
    Case("6.3 PRIORITY on stream 0", frame(PRIORITY, 0, 0, priority(1)), PROTOCOL),
    Case("6.4 RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, number(8)), PROTOCOL),
    Case("6.5 SETTINGS on a stream", frame(SETTINGS, 0, 1), PROTOCOL),
    Case("6.5 an acknowledgement with content", frame(SETTINGS, ACK, 0, setting(1, 1)), SIZE),
    Case("6.5 SETTINGS of five bytes", frame(SETTINGS, 0, 0, bytes(5)), SIZE),
    Case("6.5.2 ENABLE_PUSH of 2", settings(SettingCodes.ENABLE_PUSH, 2), PROTOCOL),
    Case("6.5.2 a window above the maximum",
         settings(SettingCodes.INITIAL_WINDOW_SIZE, MAX_WINDOW + 1), FLOW),
    Case("6.5.2 frames below the minimum",
         settings(SettingCodes.MAX_FRAME_SIZE, SMALLEST_MAX_FRAME - 1), PROTOCOL),
    Case("6.5.2 frames above the maximum", settings(SettingCodes.MAX_FRAME_SIZE, 2**24), PROTOCOL),
    Case("6.5.2 an unknown setting", settings(UNKNOWN_SETTING, 1), TOLERATED),
    Case("6.6 PUSH_PROMISE from a client",
         frame(PUSH, END_HEADERS, 1, number(2) + block(CONNECT)), PROTOCOL),
    Case("6.7 PING on a stream", frame(PING, 0, 1, bytes(8)), PROTOCOL),
    Case("6.7 PING of six bytes", frame(PING, payload=bytes(6)), SIZE),
    Case("6.7 an answer to no PING", frame(PING, ACK, payload=b"nonsense"), TOLERATED),
    Case("6.8 GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    Case("6.8 GOAWAY of four bytes", frame(GOAWAY, payload=bytes(4)), SIZE),
    Case("6.8 GOAWAY", frame(GOAWAY, payload=bytes(8)), TOLERATED),
    Case("6.9 WINDOW_UPDATE of 0", frame(WINDOW, payload=number(0)), PROTOCOL),
    Case("6.9 WINDOW_UPDATE of three bytes", frame(WINDOW, payload=bytes(3)), SIZE),
    Case("6.9.1 a window above the maximum", frame(WINDOW, payload=number(MAX_WINDOW)), FLOW),
    Case("6.10 CONTINUATION behind a whole block", request() + frame(CONTINUATION, 0, 1), PROTOCOL),
    Case("6.10 a block in three pieces",
         frame(HEADERS, 0, 1, block(CONNECT[:1])) + frame(CONTINUATION, 0, 1, block(CONNECT[1:]))
         + frame(CONTINUATION, END_HEADERS, 1), TOLERATED),
    Case("6.10 CONTINUATION without end",
         request(flags=0) + frame(CONTINUATION, 0, 1, b"") * 9, CALM),
    a_request("8.2 a name in capitals", STREAM_PROTOCOL, *CONNECT, ("Baggage", "a=b")),
    a_request("8.2.2 a field about the connection", STREAM_PROTOCOL, *CONNECT,
              ("connection", "close")),
    a_request("8.2.2 TE other than trailers", STREAM_PROTOCOL, *CONNECT, ("te", "gzip")),
    a_request("8.3 an unknown pseudo field", STREAM_PROTOCOL, *CONNECT, (":test", "x")),
    a_request("8.3 a field of responses", STREAM_PROTOCOL, *CONNECT, (":status", "200")),
    a_request("8.3 a pseudo field at the end", STREAM_PROTOCOL, CONNECT[0], ("a", "b"), CONNECT[1]),
    a_request("8.3.1 a method twice", STREAM_PROTOCOL, CONNECT[0], *CONNECT),
    a_request("8.3.1 GET without a path", STREAM_PROTOCOL, (":method", "GET"), (":scheme", "http")),
    a_request("8.5 CONNECT without authority", STREAM_PROTOCOL, CONNECT[0]),
    a_request("8.5 CONNECT with scheme and path", STREAM_PROTOCOL, *CONNECT,
              (":scheme", "http"), (":path", "/")),
    a_request("RFC 8441: a protocol we never announced", STREAM_PROTOCOL, *CONNECT,
              (":scheme", "http"), (":path", "/"), (":protocol", "websocket")),
]  # fmt: skip

# After the greeting: requests that are sound, and refused with a status.
REFUSED = [
    a_request("a method other than CONNECT", "400",
              (":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", AUTHORITY)),
    a_request("an authority that is none", "400", CONNECT[0], (":authority", "nonsense")),
    a_request("an authority without port", "400", CONNECT[0], (":authority", "10.244.1.10")),
    a_request("another's address", "400", CONNECT[0], (":authority", "10.9.9.9:80")),
    a_request("nobody's name", "503", CONNECT[0], (":authority", "nobody.example:80")),
    a_request("our own port", "503", CONNECT[0], (":authority", "10.244.1.10:15008")),
    a_request("a port where nobody listens", "503", CONNECT[0], (":authority", "10.244.1.10:9")),
]  # fmt: skip

# After stream 1 has been accepted.
ON_OPEN = [
    Case("5.1 DATA after our end",
         frame(DATA, END_STREAM, 1) + frame(DATA, 0, 1, b"?"), STREAM_CLOSED),
    Case("5.1 HEADERS after our end", frame(DATA, END_STREAM, 1) + request(), STREAM_CLOSED),
    Case("5.1 WINDOW_UPDATE after our end",
         frame(DATA, END_STREAM, 1) + frame(WINDOW, 0, 1, number(1)), TOLERATED),
    Case("5.1 DATA after our reset",
         frame(RST_STREAM, 0, 1, number(8)) + frame(DATA, 0, 1, b"?"), STREAM_CLOSED),
    Case("5.1 HEADERS after our reset", frame(RST_STREAM, 0, 1, number(8)) + request(), CLOSED),
    Case("5.1 WINDOW_UPDATE after our reset",
         frame(RST_STREAM, 0, 1, number(8)) + frame(WINDOW, 0, 1, number(1)), TOLERATED),
    Case("5.1 a second reset", frame(RST_STREAM, 0, 1, number(8)) * 2, TOLERATED),
    Case("5.1 PRIORITY after our reset",
         frame(RST_STREAM, 0, 1, number(8)) + frame(PRIORITY, 0, 1, priority(0)), TOLERATED),
    Case("5.1.1 a stream below the last one", request(5) + request(3), CLOSED),
    Case("6.1 DATA with more padding than room", frame(DATA, PADDED, 1, b"\x06hello"), PROTOCOL),
    Case("6.1 DATA with padding", frame(DATA, PADDED, 1, b"\x02hello\0\0"), TOLERATED),
    Case("6.3 PRIORITY of four bytes", frame(PRIORITY, 0, 1, bytes(4)), STREAM_SIZE),
    Case("6.4 RST_STREAM of three bytes", frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
    Case("6.9 WINDOW_UPDATE of 0", frame(WINDOW, 0, 1, number(0)), STREAM_PROTOCOL),
    Case("6.9.1 a window above the maximum", frame(WINDOW, 0, 1, number(MAX_WINDOW)), STREAM_FLOW),
    # Twice more, for what the buffers of two sockets take meanwhile.
    Case("6.9.1 more DATA than the stream's window",
         frame(DATA, 0, 1, bytes(MAX_FRAME)) * (3 * STREAM_WINDOW // MAX_FRAME), STREAM_FLOW),
    Case("6.9.2 SETTINGS that overflow a window",
         frame(WINDOW, 0, 1, number(MAX_WINDOW - DEFAULT_WINDOW))
         + settings(SettingCodes.INITIAL_WINDOW_SIZE, DEFAULT_WINDOW + 1), FLOW),
    Case("6.9.2 a window that becomes negative",
         settings(SettingCodes.INITIAL_WINDOW_SIZE, 0), TOLERATED),
    Case("8.1 trailers with a pseudo field",
         request(fields=[(":status", "200")], flags=HALF_OPEN), STREAM_PROTOCOL),
    Case("8.1 trailers without end", request(fields=[("a", "b")]), STREAM_PROTOCOL),
    Case("8.1 trailers", request(fields=[("a", "b")], flags=HALF_OPEN), TOLERATED),
]  # fmt: skip

# What a server may do wrong with stream 1, before it has answered.
UNANSWERED = [
    Case("DATA before the answer", frame(DATA, 0, 1, b"?"), STREAM_PROTOCOL),
    Case("no status", request(fields=[("a", "b")]), STREAM_PROTOCOL),
    Case("a status that is no number", request(fields=[(":status", "2OO")]), STREAM_PROTOCOL),
    Case("switching protocols", request(fields=[(":status", "101")]), STREAM_PROTOCOL),
    Case("an interim answer that ends the stream",
         request(fields=[(":status", "103")], flags=HALF_OPEN), STREAM_PROTOCOL),
    Case("a name in capitals", request(fields=[(":status", "200"), ("Via", "x")]), STREAM_PROTOCOL),
    Case("a request field", request(fields=[(":status", "200"), (":path", "/")]), STREAM_PROTOCOL),
    Case("a broken header block", frame(HEADERS, END_HEADERS, 1, BROKEN_BLOCK), COMPRESSION),
    Case("a promise", frame(PUSH, END_HEADERS, 1, number(2) + block(CONNECT)), PROTOCOL),
    Case("a request of its own", request(2), PROTOCOL),
    Case("an answer to nothing", request(99, [(":status", "200")]), PROTOCOL),
    Case("pushing is allowed", settings(SettingCodes.ENABLE_PUSH, 1), PROTOCOL),
    Case("frames below the minimum", settings(SettingCodes.MAX_FRAME_SIZE, 1), PROTOCOL),
    Case("an interim answer first",
         request(fields=[(":status", "103")]) + request(fields=[(":status", "200")]), TOLERATED),
    Case("an answer and the end", request(fields=[(":status", "200")], flags=HALF_OPEN), TOLERATED),
]  # fmt: skip

# And after it has.
ANSWERED = [
    Case("DATA after its end",
         frame(DATA, END_STREAM, 1) + frame(DATA, 0, 1, b"?"), STREAM_CLOSED),
    Case("a second answer", request(fields=[(":status", "200")]), STREAM_PROTOCOL),
    Case("a window above the maximum", frame(WINDOW, 0, 1, number(MAX_WINDOW)), STREAM_FLOW),
    Case("DATA on stream 0", frame(DATA, 0, 0, b"?"), PROTOCOL),
    Case("more padding than room", frame(DATA, PADDED, 1, b"\x06hello"), PROTOCOL),
    Case("a window of 0 for good", settings(SettingCodes.INITIAL_WINDOW_SIZE, 0), TOLERATED),
]  # fmt: skip
