"""The peer's control frames: SETTINGS, PING, GOAWAY, RST_STREAM, WINDOW_UPDATE (RFC 9113 s6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.events import (
    Event,
    GoawayReceived,
    PingAcknowledged,
    SettingsReceived,
    StreamReset,
    WindowOpened,
)
from ztunnel.wire.hbone.frames import (
    ACK,
    MAX_STREAM_ID,
    MAX_WINDOW,
    TWO_UINT32,
    UINT32,
    FrameKind,
)
from ztunnel.wire.hbone.outgoing import PING_SIZE, Outgoing
from ztunnel.wire.hbone.settings import UNLIMITED_STREAMS, parse_settings
from ztunnel.wire.hbone.stream import Stream

PRIORITY_SIZE: Final = 5
# A change of the peer's window walks over all live streams.
SETTINGS_COST: Final = 10


class Steering(Outgoing):
    """Adds what the peer's control frames do to the shared state."""

    __slots__ = ()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._require_connection(stream_id, FrameKind.SETTINGS)
        self._nuisance.spend("SETTINGS", cost=SETTINGS_COST)
        if flags & ACK:
            self._require_size(FrameKind.SETTINGS, payload, 0)
            self._adopt_own_settings()
            return
        values = parse_settings(payload, client=self.client)
        if not self.settings_received:
            self.peer_max_concurrent_streams = UNLIMITED_STREAMS
            self.settings_received = True
        for code, value in values:
            match code:
                case SettingCodes.HEADER_TABLE_SIZE:
                    self._codec.resize(value)
                case SettingCodes.MAX_CONCURRENT_STREAMS:
                    self.peer_max_concurrent_streams = value
                case SettingCodes.MAX_FRAME_SIZE:
                    self.peer_max_frame_size = value
                case SettingCodes.INITIAL_WINDOW_SIZE:
                    self._shift_send_windows(value - self._peer_stream_window, events)
                    self._peer_stream_window = value
                case _:
                    pass  # push, priorities and advice do not concern us
        self._acknowledge(FrameKind.SETTINGS)
        events.append(SettingsReceived())

    def _adopt_own_settings(self) -> None:
        """Hold the peer to a stream window below the default, now that it has agreed."""
        change = self.settings.stream_window - self._stream_window
        if change:
            self._stream_window = self.settings.stream_window
            for stream in self.streams.values():
                stream.receive_window += change

    def _shift_send_windows(self, change: int, events: list[Event]) -> None:
        """Apply a new initial window to the live streams (RFC 9113 s6.9.2); it may go negative."""
        if not change:
            return
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > MAX_WINDOW:
                raise TunnelError(
                    f"SETTINGS overflow the window of stream {stream.id}",
                    code=ErrorCodes.FLOW_CONTROL_ERROR,
                )
            if change > 0 and stream.send_window > 0 and not stream.local_ended:
                events.append(WindowOpened(stream))

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._require_connection(stream_id, FrameKind.PING)
        self._require_size(FrameKind.PING, payload, PING_SIZE)
        self._nuisance.spend("PING")
        if flags & ACK:
            events.append(PingAcknowledged(payload))
        else:
            self._acknowledge(FrameKind.PING, payload)

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._require_connection(stream_id, FrameKind.GOAWAY)
        if len(payload) < TWO_UINT32.size:
            self._require_size(FrameKind.GOAWAY, payload, TWO_UINT32.size)
        self._nuisance.spend("GOAWAY")
        last, code = TWO_UINT32.unpack_from(payload)
        last &= MAX_STREAM_ID
        if self.goaway_received is not None:
            # It may only come down; one that rises cannot bring refused streams back.
            last = min(last, self.goaway_received.last_stream_id)
        goaway = GoawayReceived(last, code, payload[TWO_UINT32.size :])
        self.goaway_received = goaway
        self.draining = True
        events.append(goaway)
        if self.client:
            self._refuse_above(last, events)

    def _refuse_above(self, last: int, events: list[Event]) -> None:
        """Give back the streams that the peer says it never looked at."""
        for stream in [each for each in self.streams.values() if each.id > last]:
            self._drop(stream)
            self._remember_reset(stream.id)
            events.append(StreamReset(stream, ErrorCodes.REFUSED_STREAM))

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._require_size(FrameKind.RST_STREAM, payload, UINT32.size)
        stream = self._find(stream_id, FrameKind.RST_STREAM)
        if stream is None:
            # Both ends reset at once, once per stream; more than that is a nuisance.
            if stream_id in self._reset_ids:
                del self._reset_ids[stream_id]
            else:
                self._nuisance.spend("RST_STREAM")
            return
        if not self.client and not stream.answered:
            self._resets.spend("cancelled streams")  # rapid reset, CVE-2023-44487
        self._drop(stream)
        events.append(StreamReset(stream, UINT32.unpack(payload)[0]))

    def _on_window_update(
        self, _flags: int, stream_id: int, payload: bytes, events: list[Event]
    ) -> None:
        self._require_size(FrameKind.WINDOW_UPDATE, payload, UINT32.size)
        self._nuisance.spend("WINDOW_UPDATE")
        increment = UINT32.unpack(payload)[0] & MAX_WINDOW
        if stream_id == 0:
            self._widen_connection(increment)
            events.append(WindowOpened(None))
            return
        stream = self._find(stream_id, FrameKind.WINDOW_UPDATE)
        if stream is None:
            return  # credit for a stream that ended while it was on its way
        if increment == 0:
            self._blame(stream, ErrorCodes.PROTOCOL_ERROR, events)
        elif stream.send_window + increment > MAX_WINDOW:
            self._blame(stream, ErrorCodes.FLOW_CONTROL_ERROR, events)
        else:
            stream.send_window += increment
            if stream.send_window > 0 and not stream.local_ended:
                events.append(WindowOpened(stream))

    def _widen_connection(self, increment: int) -> None:
        if increment == 0:
            raise TunnelError("WINDOW_UPDATE of 0", code=ErrorCodes.PROTOCOL_ERROR)
        self.send_window += increment
        if self.send_window > MAX_WINDOW:
            raise TunnelError(
                "WINDOW_UPDATE overflows the window", code=ErrorCodes.FLOW_CONTROL_ERROR
            )

    def _on_priority(
        self, _flags: int, stream_id: int, payload: bytes, events: list[Event]
    ) -> None:
        """Ignore priorities, but not broken ones (RFC 9113 s6.3)."""
        if stream_id == 0:
            raise TunnelError("PRIORITY on stream 0", code=ErrorCodes.PROTOCOL_ERROR)
        self._nuisance.spend("PRIORITY")
        if len(payload) == PRIORITY_SIZE:
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._require_size(FrameKind.PRIORITY, payload, PRIORITY_SIZE)
        else:
            self._blame(stream, ErrorCodes.FRAME_SIZE_ERROR, events)

    def _on_push(self, _flags: int, _id: int, _payload: bytes, _events: list[Event]) -> None:
        raise TunnelError("PUSH_PROMISE", code=ErrorCodes.PROTOCOL_ERROR)

    def _find(self, stream_id: int, kind: FrameKind) -> Stream | None:
        """Return a live stream, None for one that is over.

        Raises:
            TunnelError: there has never been such a stream.
        """
        stream = self.streams.get(stream_id)
        if stream is None and self._is_idle(stream_id):
            raise TunnelError(
                f"{kind.name} on stream {stream_id}, which never was",
                code=ErrorCodes.PROTOCOL_ERROR,
            )
        return stream

    def _is_idle(self, stream_id: int) -> bool:
        """Tell whether a number cannot name any stream so far; only clients open streams here."""
        newest = self._next_id - 2 if self.client else self._last_peer_id
        return stream_id > newest or stream_id % 2 == 0

    def _require_connection(self, stream_id: int, kind: FrameKind) -> None:
        if stream_id != 0:
            raise TunnelError(f"{kind.name} on stream {stream_id}", code=ErrorCodes.PROTOCOL_ERROR)

    def _require_size(self, kind: FrameKind, payload: bytes, size: int) -> None:
        if len(payload) != size:
            raise TunnelError(
                f"{kind.name} of {len(payload)} bytes, not {size}",
                code=ErrorCodes.FRAME_SIZE_ERROR,
            )

    control_handlers: ClassVar[
        dict[int, Callable[[Steering, int, int, bytes, list[Event]], None]]
    ] = {
        FrameKind.PRIORITY: _on_priority,
        FrameKind.RST_STREAM: _on_reset,
        FrameKind.SETTINGS: _on_settings,
        FrameKind.PUSH_PROMISE: _on_push,
        FrameKind.PING: _on_ping,
        FrameKind.GOAWAY: _on_goaway,
        FrameKind.WINDOW_UPDATE: _on_window_update,
    }
