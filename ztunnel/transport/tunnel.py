"""One HBONE connection in the reactor: records outside, `wire.hbone` inside.

The tunnel owns the socket, the record layer and the HTTP/2 core; everything about it is plain data
(architecture.md decision 4). A stream belongs to its `owner`, which learns of each thing that
happens to it by a plain call and never waits. Bytes go out in two ways: small frames gather in the
core and leave in one record at the end of the turn, bulk leaves at once behind them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from ztunnel.errors import DrainError, LimitError, PeerError, TlsError, TunnelError, ZtunnelError
from ztunnel.transport.buffers import PLAIN, RECEIVE, SEND, UNIT_FIRST, UNIT_MOST, grown
from ztunnel.transport.dispatch import STREAM_EVENTS
from ztunnel.transport.heartbeat import PING_PAYLOAD, PING_SECONDS, Heartbeat, Pulse
from ztunnel.transport.outbox import Outbox
from ztunnel.transport.reactor import HUNG_UP, READABLE, WRITABLE
from ztunnel.wire.hbone import events as happened
from ztunnel.wire.hbone.connection import DRAIN_PING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ztunnel.tls.records import RecordLayer
    from ztunnel.transport.facts import TunnelFacts
    from ztunnel.transport.owners import Resumable, StreamOwner, TunnelOwner
    from ztunnel.transport.reactor import Reactor
    from ztunnel.wire.hbone.connection import HboneConnection
    from ztunnel.wire.hbone.events import Headers
    from ztunnel.wire.hbone.stream import Stream

READS_PER_TURN = 4  # performance.md 11
HELD_MOST = 64 * 1024 * 1024  # bytes kept for slow readers of one tunnel: 16 full windows
PARK_SECONDS = 1.0  # what a busy tunnel pays for being parked then is 20 us
DRAIN_PONG_SECONDS = 1.0  # how long the peer may take to answer the first of two GOAWAYs


class Tunnel:
    """An established HBONE connection, either end."""

    __slots__ = (
        "_awake",
        "_dirty",
        "_drain_told",
        "_draining",
        "_first",
        "_heartbeat",
        "_held",
        "_held_bytes",
        "_hung_up",
        "_outbox",
        "_owner",
        "_reactor",
        "_records",
        "_unit",
        "_waiting",
        "closed",
        "closed_because",
        "core",
        "facts",
        "opened",
        "sock",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        records: RecordLayer,
        core: HboneConnection,
        owner: TunnelOwner,
        facts: TunnelFacts,
    ) -> None:
        self.sock = sock
        self.core = core
        self.facts = facts
        self.closed = False
        self.closed_because: ZtunnelError | None = None
        self.opened = 0  # streams, in all its life
        self._reactor = reactor
        self._records = records
        self._owner = owner
        self._held_bytes = 0  # what relays keep for readers that are slow
        self._held = self._first = b""  # a record cut short; what the handshake owes the peer
        self._outbox = Outbox(sock)
        self._waiting: dict[Resumable, None] = {}  # in order of arrival
        self._unit = UNIT_FIRST
        self._hung_up = self._dirty = self._draining = self._drain_told = False
        self._awake = False  # the records are to be parked
        self._heartbeat = Heartbeat()

    def start(self, leftover: bytes, unsent: bytes = b"") -> None:
        """Begin: `leftover` came behind the handshake, `unsent` leaves in front of all else."""
        self._first = unsent
        self._reactor.register(self.sock, self)
        self._reactor.deadline(PING_SECONDS, self._ping_tick)
        self.flush_later()
        if leftover:
            RECEIVE[: len(leftover)] = leftover
            self._digest(len(leftover))

    @property
    def blocked(self) -> bool:
        """Whether the socket takes no more for now."""
        return self._outbox.blocked

    @property
    def accepts_streams(self) -> bool:
        """Whether a new stream may be opened."""
        return not (self.closed or self._draining or self.core.draining or self._records.retire)

    def open(self, headers: Headers, owner: StreamOwner) -> Stream:
        """Open a stream with a request; the answer comes to `owner`.

        Raises:
            LimitError: the peer takes no further stream, now or ever.
        """
        if not self.accepts_streams:
            raise LimitError("the HBONE connection takes no more streams")
        stream = self.core.open(headers)
        stream.owner = owner
        self.opened += 1
        self.flush_later()
        return stream

    def hold(self, size: int) -> None:
        """Note that relays hold `size` more bytes of this tunnel (or less, if negative).

        Beyond `HELD_MOST` the peer gets no credit for the connection until half of it has gone.
        """
        self._held_bytes += size
        core = self.core
        if core.withholding and self._held_bytes <= HELD_MOST // 2:
            core.withhold(more=False)
            self.flush_later()
        elif self._held_bytes > HELD_MOST:
            core.withhold(more=True)

    def wait(self, relay: Resumable) -> None:
        """Have `relay.pump` called when the socket or the connection window has room again."""
        self._waiting[relay] = None

    def forget(self, relay: Resumable) -> None:
        """Drop a relay that waits no more."""
        self._waiting.pop(relay, None)

    def flush_later(self) -> None:
        """Send what the core has gathered at the end of this turn."""
        if not self._dirty:
            self._dirty = True
            self._reactor.flush_later(self)

    def send_frames(self, size: int) -> None:
        """Seal and send `size` bytes of whole frames that lie in `SEND`, behind what waits."""
        before = self._seal_control()
        self._transmit(before, self._records.seal_bulk(SEND, size))

    def released(self) -> None:
        """Note that a stream is done with; closes a draining tunnel after its last one."""
        self.flush_later()
        if self._draining and not self.core.streams:
            self._reactor.soon(self._close_drained)
        self._owner.on_released(self)

    def drain(self) -> None:
        """Take no new streams, tell the peer in two steps, close when the last stream ends."""
        if self._draining or self.closed:
            return
        self._draining = True
        self.core.begin_drain()
        self.flush_later()
        self._reactor.deadline(DRAIN_PONG_SECONDS, self._finish_drain)
        if not self.core.streams:
            self._reactor.soon(self._close_drained)

    # The reactor calls these.

    def on_event(self, events: int) -> None:
        """Move what can be moved."""
        if self.closed:
            return
        if events & WRITABLE and self._outbox.blocked:
            self._send_pending()
        self._hung_up = self._hung_up or bool(events & HUNG_UP)
        if events & (READABLE | HUNG_UP) and not self.closed:
            self._read()

    def flush(self) -> None:
        """Send control and small frames in one record."""
        self._dirty = False
        if not (self._outbox.blocked or self.closed) and (sealed := self._seal_control()):
            self._transmit(b"", sealed)

    def fail(self, error: Exception) -> None:
        """End the connection because of a bug of ours."""
        self.close(TunnelError(f"internal error: {error}", code=2))

    def close(self, error: ZtunnelError | None = None) -> None:
        """End the connection now; every live stream is lost."""
        if self.closed:
            return
        if isinstance(error, DrainError) or (error is None and not self._records.closed):
            # Peers learn that this was on purpose; the reference just vanishes (17.11).
            self.core.goaway()
        self.closed = True
        self.closed_because = error
        if not self._outbox.blocked:
            self._say_goodbye(error)
        self._reactor.forget(self.sock)
        self.sock.close()
        self._waiting.clear()
        lost = error or PeerError("connection closed by the peer")
        for stream in list(self.core.streams.values()):
            if stream.owner is not None:
                stream.owner.on_lost(lost)
        self._owner.on_closed(self, error)

    # Receiving.

    def _read(self) -> None:
        for _ in range(READS_PER_TURN):
            if held := len(self._held):
                RECEIVE[:held] = self._held
            unit = self._unit
            try:
                size = self.sock.recv_into(RECEIVE[held:], unit)
            except BlockingIOError:
                return
            except OSError as error:
                self.close(PeerError(f"io error: {error.strerror}"))
                return
            if not size:
                self.close(self._end_reason())
                return
            self._heartbeat.heard = True
            self._unit = grown(unit, size)
            self._digest(held + size)
            if self.closed or (size < unit and not self._hung_up):
                return  # a short read means drained, unless an end is queued behind the data
            if unit == UNIT_MOST:
                break  # the peer gets credit at the end of a turn: it must not wait for four
        self._reactor.again(self)

    def _digest(self, size: int) -> None:
        records = self._records
        if not self._awake:
            self._awake = True
            self._reactor.deadline(PARK_SECONDS, self._park)
        try:
            consumed, produced = records.open(RECEIVE[:size], PLAIN)
        except TlsError as error:
            self._held = b""
            self.close(error)
            return
        self._held = bytes(RECEIVE[consumed:size]) if consumed < size else b""
        if produced:
            self._take(produced)
        if self.closed:
            return
        self._send_reply()
        if records.closed and not self.closed:
            self.close(self._end_reason())

    def _take(self, size: int) -> None:
        core = self.core
        broken: TunnelError | None = None
        try:
            events = core.receive(PLAIN[:size])
        except TunnelError as error:
            broken, events = error, []
        if core.control:
            self.flush_later()
        for event in events:
            if type(event) is happened.DataReceived and (reader := event.stream.owner) is not None:
                reader.on_data(event)  # as `_DISPATCH` would, which costs each message more
            else:
                self._DISPATCH[type(event)](self, event)
            if self.closed:
                return
        if broken is None and self._outbox.is_unread(len(core.control)):
            broken = TunnelError("the peer asks and reads no answers")
        if broken is not None:
            self.close(broken)

    def _end_reason(self) -> ZtunnelError | None:
        # Without close_notify it is a truncation; with streams open they are cut, not finished.
        cut = "peer closed the connection with streams open"
        return PeerError(cut) if self.core.streams else None

    # Sending.

    def _seal_control(self) -> bytes:
        """Take and seal what the core has gathered; records leave in the order they are sealed."""
        control, self.core.control = self.core.control, bytearray()
        first, self._first = self._first, b""
        return first + self._records.seal_small(control) if control else first

    def _transmit(self, before: bytes, sealed: bytes | memoryview) -> None:
        try:
            self._outbox.send(before, sealed)
        except OSError as error:
            self._send_failed(error)

    def _send_reply(self) -> None:
        # Never behind what waits: each would cost a copy of that, and one answers many requests.
        if not self._outbox.blocked and (sealed := self._records.take_reply()):
            self._transmit(b"", sealed)

    def _send_pending(self) -> None:
        try:
            empty = self._outbox.drain()
        except OSError as error:
            self._send_failed(error)
            return
        if empty:
            self._send_reply()
            self.flush()
            self._wake()

    def _send_failed(self, error: OSError) -> None:
        # Not closed here: the caller is in the middle of a stream's work.
        reason = PeerError(f"io error: {error.strerror}")
        self._reactor.soon(lambda: self.close(reason))

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for relay in waiting:
            relay.pump()

    def _say_goodbye(self, error: ZtunnelError | None) -> None:
        # An alert was sealed already: what is sealed behind it must not leave in front of it.
        alert = error.alert if isinstance(error, TlsError) else b""
        last = self._first + alert if alert else self._seal_control() + self._records.close_notify()
        with contextlib.suppress(OSError):  # the peer is gone or does not read
            self.sock.send(last)

    # Events of the core.

    def _on_request(self, event: happened.RequestReceived) -> None:
        self._owner.on_request(self, event)

    def _on_window(self, event: happened.WindowOpened) -> None:
        if event.stream is None:
            if not self._outbox.blocked:
                self._wake()
        elif event.stream.owner is not None:
            event.stream.owner.on_window()

    def _on_settings(self, event: happened.SettingsReceived) -> None:  # noqa: ARG002
        self._owner.on_settings(self)

    def _on_goaway(self, event: happened.GoawayReceived) -> None:  # noqa: ARG002
        self._owner.on_goaway(self)

    def _on_pong(self, event: happened.PingAcknowledged) -> None:
        if event.payload == DRAIN_PING:
            self._finish_drain()

    def _finish_drain(self) -> None:
        """Say which stream was the last, once: when the peer has answered, or in any case soon."""
        if self._draining and not self.closed and not self._drain_told:
            self._drain_told = True
            self.core.finish_drain()
            self.flush_later()

    def _ping_tick(self) -> None:
        if self.closed:
            return
        pulse = self._heartbeat.tick()
        if pulse is Pulse.GONE:
            self.close(PeerError("HBONE ping timeout"))
            return
        if pulse is Pulse.ASK:
            self.core.ping(PING_PAYLOAD)
            self.flush()
        self._reactor.deadline(PING_SECONDS, self._ping_tick)

    def _park(self) -> None:
        """Drop the ciphers until there is something to read: whatever we say has an answer."""
        self._awake = False
        self._records.park()

    def _close_drained(self) -> None:
        if self._outbox.blocked:
            self._reactor.deadline(DRAIN_PONG_SECONDS, self._close_drained)
        elif not self.core.streams:
            self.close()

    _DISPATCH: ClassVar[dict[type, Callable[[Tunnel, Any], None]]] = {
        **STREAM_EVENTS,
        happened.RequestReceived: _on_request,
        happened.WindowOpened: _on_window,
        happened.SettingsReceived: _on_settings,
        happened.GoawayReceived: _on_goaway,
        happened.PingAcknowledged: _on_pong,
    }
