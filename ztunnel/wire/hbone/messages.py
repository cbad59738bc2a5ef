"""HEADERS and CONTINUATION: requests, responses and trailers (RFC 9113 s6.2, s6.10, s8.1).

Every complete block is decoded, also for a stream that is refused or gone, because each one
changes the table that the next is read with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from h2.errors import ErrorCodes

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.events import (
    Event,
    Headers,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
)
from ztunnel.wire.hbone.fields import is_request, is_trailers, status_of
from ztunnel.wire.hbone.frames import (
    END_HEADERS,
    END_STREAM,
    PADDED,
    PRIORITY_FLAG,
    FrameKind,
)
from ztunnel.wire.hbone.settings import HboneLimits, HboneSettings
from ztunnel.wire.hbone.steering import PRIORITY_SIZE, Steering
from ztunnel.wire.hbone.stream import Stream

FIRST_FINAL_STATUS: Final = 200
SWITCHING_PROTOCOLS: Final = 101


class Messages(Steering):
    """Adds header blocks and what they begin, answer or end."""

    __slots__ = (
        "_block",
        "_block_ends_stream",
        "_block_stream_id",
        "_continuations",
        "_expected",
    )

    def __init__(self, *, client: bool, settings: HboneSettings, limits: HboneLimits) -> None:
        super().__init__(client=client, settings=settings, limits=limits)
        # The only kind of frame that may come next, None for any.
        self._expected: FrameKind | None = FrameKind.SETTINGS
        self._block = b""  # of a few fragments at most
        self._block_stream_id = 0
        self._block_ends_stream = False
        self._continuations = 0

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id == 0:
            raise TunnelError("HEADERS on stream 0", code=ErrorCodes.PROTOCOL_ERROR)
        self._block_stream_id = stream_id
        self._block_ends_stream = bool(flags & END_STREAM)
        self._continuations = 0
        if flags & (PADDED | PRIORITY_FLAG):
            payload = _fragment(flags, payload)
        if flags & END_HEADERS and len(payload) <= self.limits.max_header_block:
            self._on_block(stream_id, self._codec.decode(payload), events)  # as nearly all of them
        else:
            self._extend_block(payload, flags, events)

    def _on_continuation(
        self, flags: int, stream_id: int, payload: bytes, events: list[Event]
    ) -> None:
        if self._expected is None or stream_id != self._block_stream_id:
            raise TunnelError(
                f"CONTINUATION on stream {stream_id} without HEADERS",
                code=ErrorCodes.PROTOCOL_ERROR,
            )
        self._continuations += 1
        if self._continuations > self.limits.max_continuations:
            raise TunnelError("too many CONTINUATION", code=ErrorCodes.ENHANCE_YOUR_CALM)
        self._extend_block(payload, flags, events)

    def _extend_block(self, fragment: bytes, flags: int, events: list[Event]) -> None:
        """Add to the header block, and act on it if this was its end."""
        self._block += fragment
        if len(self._block) > self.limits.max_header_block:
            raise TunnelError("a header block too large", code=ErrorCodes.ENHANCE_YOUR_CALM)
        if not flags & END_HEADERS:
            self._expected = FrameKind.CONTINUATION
            return
        self._expected = None
        headers = self._codec.decode(self._block)
        self._block = b""
        self._on_block(self._block_stream_id, headers, events)

    def _on_block(self, stream_id: int, headers: Headers, events: list[Event]) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            if self.client or stream_id <= self._last_peer_id:
                self._on_late_block(stream_id)
            else:
                self._on_request(stream_id, headers, events)
        elif stream.remote_ended:
            self._blame(stream, ErrorCodes.STREAM_CLOSED, events)
        elif self.client and not stream.answered:
            self._on_response(stream, headers, events)
        elif self._block_ends_stream and is_trailers(headers):
            self._close_remotely(stream)
            events.append(StreamEnded(stream, headers))
        else:
            self._blame(stream, ErrorCodes.PROTOCOL_ERROR, events)

    def _on_late_block(self, stream_id: int) -> None:
        """Judge a block for a stream that is over, or never was.

        A client may have reset more streams at once than are remembered, and then get all their
        answers; so it is patient. A server sees only trailers, which no peer of ours sends.
        """
        self._find(stream_id, FrameKind.HEADERS)
        if stream_id in self._reset_ids:
            return
        if not self.client:
            raise TunnelError(
                f"HEADERS on stream {stream_id}, which is over", code=ErrorCodes.STREAM_CLOSED
            )
        self._nuisance.spend("HEADERS for streams that are over")

    def _on_request(self, stream_id: int, headers: Headers, events: list[Event]) -> None:
        if stream_id % 2 == 0:
            raise TunnelError(
                f"a request on stream {stream_id}, an even one", code=ErrorCodes.PROTOCOL_ERROR
            )
        self._last_peer_id = stream_id
        if stream_id > self._final_id or len(self.streams) >= self.limits.max_streams:
            self._nuisance.spend("streams over the limit")
            self._refuse_id(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        if not is_request(headers):
            self._resets.spend("malformed requests")
            self._refuse_id(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        stream = self.streams[stream_id] = Stream(
            stream_id,
            send_window=self._peer_stream_window,
            receive_window=self._stream_window,
            readable=True,
        )
        events.append(RequestReceived(stream, headers))
        if self._block_ends_stream:
            self._end_remotely(stream, events)

    def _on_response(self, stream: Stream, headers: Headers, events: list[Event]) -> None:
        status = status_of(headers)
        if status is None or status == SWITCHING_PROTOCOLS:
            self._blame(stream, ErrorCodes.PROTOCOL_ERROR, events)
        elif status >= FIRST_FINAL_STATUS:
            ended = self._block_ends_stream
            stream.answered = True
            stream.readable = not ended
            events.append(ResponseReceived(stream, status, headers, ended))
            if ended:
                self._close_remotely(stream)
        elif self._block_ends_stream:
            self._blame(stream, ErrorCodes.PROTOCOL_ERROR, events)
        else:
            self._nuisance.spend("interim responses")

    def _end_remotely(self, stream: Stream, events: list[Event]) -> None:
        """Take note that the peer has finished its direction, and say so."""
        self._close_remotely(stream)
        events.append(StreamEnded(stream))

    def _close_remotely(self, stream: Stream) -> None:
        stream.remote_ended = True
        stream.readable = False
        if stream.local_ended:
            self._complete(stream)

    frame_handlers: ClassVar[
        dict[int, Callable[[Messages, int, int, bytes, list[Event]], None]]
    ] = {
        **Steering.control_handlers,
        FrameKind.HEADERS: _on_headers,
        FrameKind.CONTINUATION: _on_continuation,
    }


def _fragment(flags: int, payload: bytes) -> bytes:
    """Return the header block fragment of a HEADERS frame, without padding and priority."""
    start = 0
    padding = 0
    needed = (1 if flags & PADDED else 0) + (PRIORITY_SIZE if flags & PRIORITY_FLAG else 0)
    if len(payload) < needed:
        raise TunnelError("HEADERS too short for its flags", code=ErrorCodes.FRAME_SIZE_ERROR)
    if flags & PADDED:
        padding = payload[0]
        start = 1
    if flags & PRIORITY_FLAG:
        start += PRIORITY_SIZE
    if start + padding > len(payload):
        raise TunnelError("HEADERS with more padding than room", code=ErrorCodes.PROTOCOL_ERROR)
    return payload[start : len(payload) - padding]
