"""What we say on a connection, and the state that both directions share (RFC 9113 s5, s6).

Frames are queued in `control`, which the shell takes and sends. Bulk DATA does not go through
here: the shell frames it in its own buffer (`pack_data_header`) and reports it with `charge`.

A stream that is gone swallows what is said about it: the shell may answer, finish, consume or
reset without first asking whether the peer was faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from h2.errors import ErrorCodes

from ztunnel.errors import LimitError, TunnelError
from ztunnel.wire.hbone.budget import Budget
from ztunnel.wire.hbone.events import Event, GoawayReceived, Headers, StreamReset
from ztunnel.wire.hbone.fields import FieldCodec
from ztunnel.wire.hbone.frames import (
    ACK,
    DATA_HEADER,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    KIND_BITS,
    MAX_STREAM_ID,
    MIN_MAX_FRAME_SIZE,
    PREFACE,
    FrameKind,
    pack_frame,
    pack_goaway,
    pack_reset,
    pack_settings,
    pack_window_update,
)
from ztunnel.wire.hbone.settings import HboneLimits, HboneSettings
from ztunnel.wire.hbone.stream import Stream

PING_SIZE: Final = 8
DRAIN_PING: Final = b"ztdrain\x00"  # what `begin_drain` pings with; any eight bytes would do

# Streams that we reset and of which frames may still be on their way. Forgetting one too early
# costs a second RST_STREAM, nothing else.
MAX_RESET_IDS: Final = 1024

NUISANCE_PER_READ: Final = 32  # far above what an honest peer's keep-alive and credits need
RESETS_PER_READ: Final = 1
# One DATA frame may be credited by two WINDOW_UPDATE: its stream's and the connection's.
CREDITS_PER_DATA: Final = 2

CREDIT_SHARE: Final = 4  # give credit back when a quarter of the window is owed


INTRODUCTIONS_MAX = 16


class Outgoing:
    """The sending side of a connection, either role."""

    __slots__ = (
        "_codec",
        "_credit_due",
        "_final_id",
        "_last_peer_id",
        "_next_id",
        "_nuisance",
        "_peer_stream_window",
        "_reply_bytes",
        "_reply_mark",
        "_reset_ids",
        "_resets",
        "_stream_window",
        "client",
        "control",
        "draining",
        "goaway_received",
        "limits",
        "peer_max_concurrent_streams",
        "peer_max_frame_size",
        "send_window",
        "settings",
        "settings_received",
        "streams",
    )

    def __init__(self, *, client: bool, settings: HboneSettings, limits: HboneLimits) -> None:
        self.client = client
        self.settings = settings
        self.limits = limits
        self.control = bytearray()
        self.streams: dict[int, Stream] = {}
        self.settings_received = False
        self.peer_max_frame_size = MIN_MAX_FRAME_SIZE
        self.peer_max_concurrent_streams = limits.assumed_peer_streams
        self.send_window = DEFAULT_WINDOW
        self.goaway_received: GoawayReceived | None = None
        self.draining = False
        self._peer_stream_window = DEFAULT_WINDOW
        # Until the peer has acknowledged our SETTINGS it may rely on the protocol's default.
        self._stream_window = max(settings.stream_window, DEFAULT_WINDOW)
        self._credit_due = -(-settings.stream_window // CREDIT_SHARE)
        self._next_id = 1
        self._last_peer_id = 0
        self._final_id = MAX_STREAM_ID  # our last GOAWAY: streams above it are refused
        self._reset_ids: dict[int, None] = {}
        self._codec = FieldCodec(max_list_size=settings.header_list_size(client=client))
        self._nuisance = Budget(limits.max_nuisance, per_read=NUISANCE_PER_READ)
        self._resets = Budget(limits.max_resets, per_read=RESETS_PER_READ)
        self._reply_bytes = 0
        self._reply_mark = 0
        self.control += introduction(settings, client=client)

    def open(self, headers: Headers) -> Stream:
        """Client: begin a stream with a request and leave our direction open.

        Raises:
            LimitError: the peer takes no further stream, now or ever; try another connection.
        """
        assert self.client
        if self.draining:
            raise LimitError("the HBONE connection takes no more streams")
        if len(self.streams) >= self.peer_max_concurrent_streams:
            raise LimitError(f"the peer takes {self.peer_max_concurrent_streams} streams at once")
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise LimitError("the HBONE connection has used up its stream ids")
        self._next_id = stream_id + 2
        stream = self.streams[stream_id] = Stream(
            stream_id,
            send_window=self._peer_stream_window,
            receive_window=self._stream_window,
            readable=False,
        )
        self._queue_headers(stream_id, headers, end_stream=False)
        return stream

    def respond(
        self,
        stream: Stream,
        status: int,
        headers: Headers | None = None,
        *,
        end_stream: bool = False,
    ) -> None:
        """Server: answer a request, once."""
        assert not self.client
        assert not stream.answered
        if stream.was_reset:
            return
        stream.answered = True
        fields = [(b":status", b"%d" % status), *(headers or ())]
        self._queue_headers(stream.id, fields, end_stream=end_stream)
        if end_stream:
            self._end_locally(stream)

    def refuse(self, stream: Stream, status: int) -> None:
        """Server: answer with a bare status and be done with the stream (dataplane.md 3.3)."""
        self.respond(stream, status, end_stream=True)
        self.reset(stream, ErrorCodes.NO_ERROR)

    def sendable(self, stream: Stream) -> int:
        """Return how many bytes of DATA payload may be sent now; 0 when our direction ended."""
        if stream.local_ended:
            return 0
        return max(0, min(self.send_window, stream.send_window))

    def charge(self, stream: Stream, size: int) -> None:
        """Account for `size` payload bytes of DATA that the caller framed and sends itself."""
        assert not stream.local_ended
        stream.send_window -= size
        self.send_window -= size
        assert self.send_window >= 0
        self._nuisance.left += CREDITS_PER_DATA

    def queue_data(self, stream: Stream, payload: memoryview | bytes) -> None:
        """Queue a small payload, at most `sendable` bytes, with the other frames."""
        size = len(payload)
        stream.send_window -= size
        self.send_window -= size
        assert size
        assert self.send_window >= 0
        assert stream.send_window >= 0
        assert not stream.local_ended
        self._nuisance.left += CREDITS_PER_DATA
        control, limit, pack = self.control, self.peer_max_frame_size, DATA_HEADER.pack
        if size <= limit:
            control += pack(size << KIND_BITS, 0, stream.id)
            control += payload
            return
        for start in range(0, size, limit):
            part = payload[start : start + limit]
            control += pack(len(part) << KIND_BITS, 0, stream.id)
            control += part

    def finish(self, stream: Stream) -> None:
        """End our direction; the peer's goes on."""
        if stream.local_ended:
            return
        self.control += pack_frame(FrameKind.DATA, END_STREAM, stream.id)
        self._end_locally(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """Abandon both directions at once."""
        if stream.id in self.streams:
            self.control += pack_reset(stream.id, code)
            self._drop(stream)
            self._remember_reset(stream.id)

    def consume(self, stream: Stream, size: int) -> bool:
        """Say that the reader took `size` bytes, so that the peer may send as many again.

        Returns whether that made something to send.
        """
        stream.owed += size
        if stream.owed < self._credit_due or not stream.readable:
            return False
        self.control += pack_window_update(stream.id, stream.owed)
        stream.receive_window += stream.owed
        stream.owed = 0
        return True

    def ping(self, payload: bytes) -> None:
        """Ask for a sign of life; `PingAcknowledged` brings the same eight bytes back."""
        assert len(payload) == PING_SIZE
        self.control += pack_frame(FrameKind.PING, 0, 0, payload)

    def goaway(self, code: int = 0, last: int | None = None, debug: bytes = b"") -> None:
        """Take no more streams above `last`, by default the newest one; the others live on."""
        final = self._last_peer_id if last is None else last
        self._final_id = min(self._final_id, final)
        self.draining = True
        self.control += pack_goaway(self._final_id, code, debug)

    def begin_drain(self) -> None:
        """Announce that we go away, and ping with `DRAIN_PING` (dataplane.md 6.7).

        Streams that the peer opened before it read this are still served. Call `finish_drain` when
        the ping is acknowledged, or when you are tired of waiting.
        """
        self.goaway(last=MAX_STREAM_ID)
        self.ping(DRAIN_PING)

    def finish_drain(self) -> None:
        """Say which stream was the last; later ones are refused, safe to retry elsewhere."""
        self.goaway()

    def _queue_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        block = self._codec.encode(headers)
        limit = self.peer_max_frame_size
        flags = END_STREAM if end_stream else 0
        kind = FrameKind.HEADERS
        while len(block) > limit:
            self.control += pack_frame(kind, flags, stream_id, block[:limit])
            block, kind, flags = block[limit:], FrameKind.CONTINUATION, 0
        self.control += pack_frame(kind, flags | END_HEADERS, stream_id, block)

    def _end_locally(self, stream: Stream) -> None:
        stream.local_ended = True
        if stream.remote_ended:
            self._complete(stream)

    def _complete(self, stream: Stream) -> None:
        """Forget a stream that both ends have finished."""
        del self.streams[stream.id]
        self._resets.left += 1

    def _drop(self, stream: Stream) -> None:
        """Forget a stream that was cut."""
        del self.streams[stream.id]
        stream.was_reset = stream.local_ended = True
        stream.readable = False

    def _remember_reset(self, stream_id: int) -> None:
        self._reset_ids[stream_id] = None
        if len(self._reset_ids) > MAX_RESET_IDS:
            del self._reset_ids[next(iter(self._reset_ids))]

    def _reply(self, frame: bytes) -> None:
        """Queue a frame that the peer provoked.

        Raises:
            TunnelError: ENHANCE_YOUR_CALM, the peer provokes more than it reads.
        """
        control = self.control
        if len(control) < self._reply_mark:
            self._reply_bytes = 0  # it can only have become shorter by being taken
        self._reply_bytes += len(frame)
        if self._reply_bytes > self.limits.max_reply_bytes:
            raise TunnelError("too many replies wait", code=ErrorCodes.ENHANCE_YOUR_CALM)
        control += frame
        self._reply_mark = len(control)

    def _acknowledge(self, kind: FrameKind, payload: bytes = b"") -> None:
        self._reply(pack_frame(kind, ACK, 0, payload))

    def _blame(self, stream: Stream, code: int, events: list[Event]) -> None:
        """Reset a stream on which the peer broke the protocol (RFC 9113 s5.4.2).

        Raises:
            TunnelError: it does so all the time, to make us work for nothing (CVE-2025-8671).
        """
        self._resets.spend("broken streams")
        self._drop(stream)
        self._refuse_id(stream.id, code)
        events.append(StreamReset(stream, code, by_peer=False))

    def _refuse_id(self, stream_id: int, code: int) -> None:
        """Reset a stream that we know by its number only."""
        self._reply(pack_reset(stream_id, code))
        self._remember_reset(stream_id)


@lru_cache(maxsize=INTRODUCTIONS_MAX)
def introduction(settings: HboneSettings, *, client: bool) -> bytes:
    """Print what either end says first; remembered, as it is the same for every connection."""
    said = PREFACE if client else b""
    said += pack_settings(settings.announced(client=client))
    # The connection's window has no setting: it starts at the default and can be raised only.
    if growth := settings.connection_window - DEFAULT_WINDOW:
        said += pack_window_update(0, growth)
    return said
