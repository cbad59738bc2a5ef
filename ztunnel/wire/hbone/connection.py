"""One HBONE connection, either end: HTTP/2 for CONNECT tunnels, without I/O (RFC 9113).

How it works. `receive` is given plaintext cut anywhere. It walks over frames in place. DATA is
never gathered: whatever part of a frame has come is handed out at once as a slice of the caller's
buffer, and `_data_left` remembers how much of it is to follow. Other frames are small and bounded;
one that is cut is copied into `_partial` until it is whole. What nobody wants (padding, unknown
frames, DATA of dead streams) is counted down in `_skip_left`. At any moment at most one of the
three is under way.

Credit for the connection goes back on receipt, so that one slow stream cannot starve the others;
credit for a stream goes back when its reader has taken the bytes (`consume`). So what waits for a
slow reader is bounded by one stream window.

The class is built in four layers, one file each, on one shared state: `Outgoing` (what we say),
`Steering` (the peer's control frames), `Messages` (its header blocks), and here framing and DATA.
An error of the connection is a TunnelError: the GOAWAY that explains it is queued by then, the
shell sends `control` and closes. An error of one stream resets that stream and is an event.
"""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.events import DataReceived, Event, GoawayReceived
from ztunnel.wire.hbone.frames import (
    ACK,
    DATA,
    DATA_HEADER,
    END_STREAM,
    FRAME_HEADER_SIZE,
    KIND_BITS,
    KIND_MASK,
    MAX_STREAM_ID,
    PADDED,
    PREFACE,
    FrameKind,
    pack_data_header,
    pack_window_update,
)
from ztunnel.wire.hbone.messages import Messages
from ztunnel.wire.hbone.outgoing import CREDIT_SHARE, DRAIN_PING
from ztunnel.wire.hbone.settings import KIB, HboneLimits, HboneSettings
from ztunnel.wire.hbone.stream import Stream

__all__ = [
    "DATA_HEADER",
    "DRAIN_PING",
    "GoawayReceived",
    "HboneConnection",
    "HboneLimits",
    "HboneSettings",
    "Stream",
    "pack_data_header",
]

# Frames that must be whole to be read. HEADERS have a limit of their own; of the others GOAWAY is
# the largest, for its debug text, and nobody's is longer than a few lines.
MAX_CONTROL_FRAME: Final = 16 * KIB
KIND_AT: Final = 3  # of a frame header: its kind
# The most that padding and priority add to the fragment in HEADERS.
HEADERS_OVERHEAD: Final = 1 + 5 + 255


class HboneConnection(Messages):
    """One connection; every method returns at once and does no I/O.

    `control` holds the bytes to send. The shell takes them by exchanging it for an empty
    bytearray; taking them is a commitment to send them, in order with the DATA it frames itself.
    It should take them only when it can pass them on, so that a peer that does not read is noticed.
    """

    __slots__ = (
        "_data_ends",
        "_data_left",
        "_data_stream",
        "_failure",
        "_owed",
        "_partial",
        "_partial_size",
        "_preface_left",
        "_receive_window",
        "_skip_left",
        "withholding",
    )

    def __init__(
        self,
        *,
        client: bool,
        settings: HboneSettings | None = None,
        limits: HboneLimits | None = None,
    ) -> None:
        super().__init__(
            client=client, settings=settings or HboneSettings(), limits=limits or HboneLimits()
        )
        self._receive_window = self.settings.connection_window
        self._owed = 0
        self.withholding = False
        self._preface_left = b"" if client else PREFACE
        self._partial: bytes | bytearray = b""  # which takes nothing, as usual
        self._partial_size = 0  # how long `_partial` must become before it can be read
        self._data_left = 0
        self._data_ends = False
        self._data_stream: Stream | None = None
        self._skip_left = 0
        self._failure: TunnelError | None = None

    def receive(self, data: memoryview) -> list[Event]:
        """Digest plaintext, cut anywhere.

        Nothing of `data` is referred to after the return but by `DataReceived.chunks`.

        Raises:
            TunnelError: the peer broke the protocol, now or in an earlier call. Send `control`,
                which ends with a GOAWAY, and close; all streams are lost.
        """
        if self._failure is not None:
            raise TunnelError(str(self._failure), code=self._failure.code)
        self._nuisance.refill()
        self._resets.refill()
        events: list[Event] = []
        try:
            self._walk(data, events)
        except TunnelError as error:
            self._failure = error
            self.goaway(error.code, debug=str(error).encode())
            raise
        return events

    def _walk(self, data: memoryview, events: list[Event]) -> None:
        """Take `data` apart from one end to the other."""
        end = len(data)
        position = self._match_preface(data) if self._preface_left else 0
        while position < end:
            if self._data_left:
                position = self._take_payload(data, position, end, events)
            elif self._skip_left:
                step = min(self._skip_left, end - position)
                self._skip_left -= step
                position += step
            elif self._partial:
                position = self._resume(data, position, events)
            elif end - position < FRAME_HEADER_SIZE:
                position = self._keep(data, position, FRAME_HEADER_SIZE)
            elif self._expected is None and not data[position + KIND_AT]:
                usual = self._take_usual_data(data, position, end, events)
                if usual == position:
                    usual = self._begin_frame(data, position, end, events)
                position = usual
            else:
                position = self._begin_frame(data, position, end, events)

    def _take_usual_data(
        self, data: memoryview, position: int, end: int, events: list[Event]
    ) -> int:
        """Take DATA frames that are whole and have no padding; return where one is not so.

        The same as `_begin_data` and `_take_payload` would do, in one go: small messages spend a
        third of their time there.
        """
        unpack, streams = DATA_HEADER.unpack_from, self.streams
        room, most = self._receive_window, self.settings.max_frame_size
        last: DataReceived | None = None
        total = 0
        while end - position >= FRAME_HEADER_SIZE:
            size_and_kind, flags, stream_id = unpack(data, position)
            size: int = size_and_kind >> KIND_BITS
            start = position + FRAME_HEADER_SIZE
            stop = start + size
            stream = streams.get(stream_id)
            if (
                size_and_kind & KIND_MASK
                or flags > END_STREAM
                or stop > end
                or stream is None
                or not stream.readable
                or size > most
                or size > stream.receive_window
                or total + size > room
                or not (size or flags)
            ):
                break
            stream.receive_window -= size
            total += size
            if last is not None and last.stream is stream:
                last.chunks.append(data[start:stop])
                last.size += size
            elif size:
                last = DataReceived(stream, [data[start:stop]], size)
                events.append(last)
            if flags:
                self._end_remotely(stream, events)
                last = None
            position = stop
        if total:
            self._debit(total)
        return position

    def _match_preface(self, data: memoryview) -> int:
        """Compare the client's first bytes with what they must be; return how many were."""
        wanted = self._preface_left
        size = min(len(wanted), len(data))
        if data[:size] != wanted[:size]:
            raise TunnelError("not an HTTP/2 preface", code=ErrorCodes.PROTOCOL_ERROR)
        self._preface_left = wanted[size:]
        return size

    def _keep(self, data: memoryview, position: int, size: int) -> int:
        """Copy the rest of `data`, the beginning of something `size` bytes long."""
        self._partial = bytearray(data[position:])
        self._partial_size = size
        return len(data)

    def _resume(self, data: memoryview, position: int, events: list[Event]) -> int:
        """Go on with what was kept; return where in `data` the rest begins."""
        stop = min(position + self._partial_size - len(self._partial), len(data))
        self._partial += data[position:stop]
        if len(self._partial) == self._partial_size:
            whole = memoryview(bytes(self._partial))
            self._partial = b""
            # A frame header that became whole may turn out to need its payload: then it is kept
            # again, with the larger size.
            self._begin_frame(whole, 0, len(whole), events)
        return stop

    def _begin_frame(self, data: memoryview, position: int, end: int, events: list[Event]) -> int:
        """Read the frame at `position`; return where the walk goes on."""
        size_and_kind, flags, stream_id = DATA_HEADER.unpack_from(data, position)
        length: int = size_and_kind >> KIND_BITS
        kind: int = size_and_kind & KIND_MASK
        stream_id &= MAX_STREAM_ID
        if length > self.settings.max_frame_size:
            raise TunnelError(f"a frame of {length} bytes", code=ErrorCodes.FRAME_SIZE_ERROR)
        if self._expected is not None:
            self._check_order(kind, flags)
        if kind == DATA:
            return self._begin_data(data, position, length, flags, stream_id, events)
        start: int = position + FRAME_HEADER_SIZE
        handler = self.frame_handlers.get(kind)
        if handler is None:
            self._nuisance.spend("frames of unknown kinds")
            self._skip_left = length
            return start
        self._check_control_size(kind, length)
        stop = start + length
        if stop > end:
            return self._keep(data, position, FRAME_HEADER_SIZE + length)
        handler(self, flags, stream_id, bytes(data[start:stop]), events)
        return stop

    def _check_order(self, kind: int, flags: int) -> None:
        """Raise TunnelError unless a frame of this kind may come now (RFC 9113 s3.4, s6.10)."""
        if kind != self._expected or (kind == FrameKind.SETTINGS and flags & ACK):
            raise TunnelError(
                f"a frame of kind {kind} where {self._expected!r} must come",
                code=ErrorCodes.PROTOCOL_ERROR,
            )
        if kind == FrameKind.SETTINGS:
            self._expected = None

    def _check_control_size(self, kind: int, length: int) -> None:
        """Raise TunnelError for a frame that would have to be kept but is too large to be."""
        limit = MAX_CONTROL_FRAME
        if kind in (FrameKind.HEADERS, FrameKind.CONTINUATION):
            limit = self.limits.max_header_block + HEADERS_OVERHEAD
        if length > limit:
            raise TunnelError(
                f"{FrameKind(kind).name} of {length} bytes", code=ErrorCodes.ENHANCE_YOUR_CALM
            )

    def _begin_data(
        self,
        data: memoryview,
        position: int,
        length: int,
        flags: int,
        stream_id: int,
        events: list[Event],
    ) -> int:
        """Account for a DATA frame and make ready for its payload; return where that begins."""
        start = position + FRAME_HEADER_SIZE
        overhead = 0
        padding = 0
        if flags & PADDED:
            if length and start == len(data):
                return self._keep(data, position, FRAME_HEADER_SIZE + 1)
            padding = data[start] if length else 0
            overhead = padding + 1
            if overhead > length:
                raise TunnelError(
                    "DATA with more padding than room", code=ErrorCodes.PROTOCOL_ERROR
                )
            start += 1
        self._debit(length)
        stream = self.streams.get(stream_id)
        if stream is None or not stream.readable or stream.receive_window < length:
            self._skip_left = length - (1 if overhead else 0)
            self._on_unwanted_data(stream, stream_id, events)
            return start
        stream.receive_window -= length
        self._data_stream = stream
        self._data_ends = bool(flags & END_STREAM)
        self._data_left = length - overhead
        self._skip_left = padding
        if overhead:
            self.consume(stream, overhead)
        if not self._data_left:
            self._on_empty_data(stream, events)
        return start

    def _debit(self, length: int) -> None:
        """Count a whole DATA frame against the connection's window, and return credit for it."""
        self._receive_window -= length
        if self._receive_window < 0:
            raise TunnelError(
                "DATA beyond the connection's window", code=ErrorCodes.FLOW_CONTROL_ERROR
            )
        owed = self._owed + length
        if owed * CREDIT_SHARE >= self.settings.connection_window and not self.withholding:
            self.control += pack_window_update(0, owed)
            self._receive_window += owed
            owed = 0
        self._owed = owed

    def withhold(self, *, more: bool) -> None:
        """Stop giving credit for the connection, or give it again with all that is owed.

        For a shell that holds more for slow readers than it cares to: their streams' windows bound
        each of them, this bounds the sum.
        """
        self.withholding = more
        if not more and self._owed:
            self.control += pack_window_update(0, self._owed)
            self._receive_window += self._owed
            self._owed = 0

    def _on_unwanted_data(self, stream: Stream | None, stream_id: int, events: list[Event]) -> None:
        """Say what is wrong with DATA whose payload is skipped."""
        if stream is None:
            self._find(stream_id, FrameKind.DATA)
            if stream_id not in self._reset_ids:
                self._refuse_id(stream_id, ErrorCodes.STREAM_CLOSED)
            elif not self._skip_left:
                self._nuisance.spend("empty DATA")
        elif stream.readable:
            self._blame(stream, ErrorCodes.FLOW_CONTROL_ERROR, events)
        elif stream.remote_ended:
            self._blame(stream, ErrorCodes.STREAM_CLOSED, events)
        else:
            self._blame(stream, ErrorCodes.PROTOCOL_ERROR, events)  # DATA before the response

    def _on_empty_data(self, stream: Stream, events: list[Event]) -> None:
        self._data_stream = None
        if self._data_ends:
            self._end_remotely(stream, events)
        else:
            self._nuisance.spend("empty DATA")

    def _take_payload(self, data: memoryview, position: int, end: int, events: list[Event]) -> int:
        """Hand out as much of the current DATA frame as is here; return where it stops."""
        stream = self._data_stream
        assert stream is not None
        stop = min(position + self._data_left, end)
        self._data_left -= stop - position
        if stream.readable:  # else it was reset since the frame began: its bytes go nowhere
            last = events[-1] if events else None
            if type(last) is DataReceived and last.stream is stream:
                last.chunks.append(data[position:stop])
                last.size += stop - position
            else:
                events.append(DataReceived(stream, [data[position:stop]], stop - position))
            if not self._data_left and self._data_ends:
                self._end_remotely(stream, events)
        if not self._data_left:
            self._data_stream = None
        return stop
