"""Joining a local socket with a stream of a tunnel.

How it works: nothing here is async and nothing is buffered that could be left where it is. Towards
the tunnel, the HTTP/2 windows and the tunnel's socket say how much is read from the local socket.
Towards the local socket, credit goes back only for bytes that it took, so the peer stops by itself;
what it did not take is kept, and that is at most one window. A FIN is carried as a FIN and an abort
as an abort, in both directions (dataplane.md 6.6 and 17.14). An application that answers and leaves
without reading on has its answer delivered (17.15).
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

from ztunnel.errors import PeerError
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.transport.buffers import (
    HEADER_BYTES,
    SEND,
    UNIT_FIRST,
    UNIT_MOST,
    areas,
    grown,
)
from ztunnel.transport.outbox import drop, keep, rest
from ztunnel.transport.reactor import BROKEN, HUNG_UP, READABLE_OR_HUNG_UP, WRITABLE
from ztunnel.transport.sockets import GONE
from ztunnel.wire.hbone.connection import pack_data_header

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ztunnel.errors import ZtunnelError
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import DataReceived, ResponseReceived
    from ztunnel.wire.hbone.stream import Stream

FIRST_AREA = SEND[HEADER_BYTES : HEADER_BYTES + UNIT_FIRST]
READS_PER_TURN = 4  # performance.md 11
SMALL_BYTES = 4096  # up to here, frames of one turn share a record (performance.md 11.4)
PIECES_PER_SEND = 64  # well under IOV_MAX
H2_NO_ERROR = 0
H2_CANCEL = 8


class StreamRelay:
    """A local socket joined to a stream of a tunnel; also the stream's owner and the handler."""

    __slots__ = (
        "_broken",
        "_deaf",
        "_ended",
        "_heard_bytes",
        "_holding",
        "_hung_up",
        "_local_ended",
        "_pending",
        "_reactor",
        "_readable",
        "_remote_ended",
        "_stream",
        "_tunnel",
        "_uncounted",
        "_unit",
        "read_bytes",
        "sock",
        "written_bytes",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        tunnel: Tunnel,
        stream: Stream,
        ended: Callable[[ZtunnelError | None], None],
    ) -> None:
        self.sock = sock
        self.read_bytes = 0  # taken from the local socket
        self.written_bytes = 0  # given to the local socket
        self._reactor = reactor
        self._tunnel = tunnel
        self._stream = stream
        self._ended: Callable[[ZtunnelError | None], None] | None = ended
        self._pending: deque[memoryview] | None = None
        self._unit = UNIT_FIRST
        self._holding = 0  # bytes of the peer's in `_pending`
        self._uncounted = 0  # pending bytes that are ours and no peer's
        self._deaf: OSError | None = None  # why the application takes no more
        self._heard_bytes = 0  # what it had said by then
        self._broken = self._readable = self._hung_up = False
        self._local_ended = self._remote_ended = False
        stream.owner = self

    @property
    def is_half_open(self) -> bool:
        """Whether one end has finished and the other has not."""
        return self._local_ended != self._remote_ended

    def look(self) -> None:
        """Take what may have come by now, without waiting to be told."""
        self._readable = True
        self.pump()

    # The reactor calls these.

    def on_event(self, events: int) -> None:
        """Move what can be moved."""
        if self._ended is None:
            return
        if self._pending is not None and events & WRITABLE:
            self._send_pending()
        if events & HUNG_UP:
            self._hung_up = True
            self._broken = self._broken or bool(events & BROKEN)
        if events & READABLE_OR_HUNG_UP:
            self._readable = True
            self.pump()

    def fail(self, error: Exception) -> None:
        """End because of a bug of ours."""
        self.cut(PeerError(f"internal error: {error}"))

    # From the socket to the stream.

    def pump(self) -> None:
        """Read from the local socket and send, as far as windows, the tunnel and the turn allow."""
        tunnel, stream = self._tunnel, self._stream
        core = tunnel.core
        budget = READS_PER_TURN
        while self._readable and not self._local_ended and self._ended is not None:
            room = stream.send_window
            if core.send_window < room:  # noqa: PLR1730 - each message pays
                room = core.send_window
            if room <= 0 or stream.local_ended or tunnel.blocked:
                self._wait_for_room(room)
                return
            if not budget:
                self._reactor.again(self)
                return
            budget = budget - 1 if self._unit < UNIT_MOST else 0
            self._move(room if room < self._unit else self._unit)  # noqa: FURB136 - likewise

    def _wait_for_room(self, room: int) -> None:
        tunnel = self._tunnel
        if room <= 0 and self._broken:
            # A peer that does not read would keep us from ever seeing the abort.
            self._local_failed(ConnectionResetError(errno.ECONNRESET, "reset"))
        elif tunnel.blocked or tunnel.core.send_window <= 0:
            tunnel.wait(self)  # else `on_window` resumes

    def _move(self, size: int) -> None:
        tunnel = self._tunnel
        frame_bytes = tunnel.core.peer_max_frame_size
        try:
            if size == UNIT_FIRST:
                got = self.sock.recv_into(FIRST_AREA)
            elif size <= frame_bytes:
                got = self.sock.recv_into(SEND[HEADER_BYTES : HEADER_BYTES + size])
            else:
                got = self.sock.recvmsg_into(areas(frame_bytes, size))[0]
        except BlockingIOError:
            self._readable = False
            return
        except OSError as error:
            self._local_failed(error)
            return
        if not got:
            self._local_eof()
            return
        if got < size and not self._hung_up:
            self._readable = False  # a short read means drained, unless an end is queued behind
        self.read_bytes += got
        if got == size == self._unit or got < size != UNIT_FIRST:  # else the window was short
            self._unit = grown(self._unit, got)
        if got <= SMALL_BYTES:
            tunnel.core.queue_data(self._stream, SEND[HEADER_BYTES : HEADER_BYTES + got])
            tunnel.flush_later()
        else:
            self._send_framed(got, frame_bytes)

    def _send_framed(self, size: int, frame_bytes: int) -> None:
        tunnel, stream = self._tunnel, self._stream
        offset, left = 0, size
        while left > 0:
            payload = min(left, frame_bytes)
            pack_data_header(SEND, offset, stream.id, payload)
            offset += HEADER_BYTES + payload
            left -= payload
        tunnel.core.charge(stream, size)
        tunnel.send_frames(offset)

    def _local_eof(self) -> None:
        deaf = self._deaf
        if deaf is not None and self.read_bytes == self._heard_bytes:
            self._local_failed(deaf)  # it had nothing more to say: no end, an abort
            return
        self._local_ended = True
        self._readable = False
        self._tunnel.core.finish(self._stream)
        self._tunnel.flush_later()
        if deaf is None:
            self._finish_if_done()
        else:
            self._local_failed(deaf)

    def _local_failed(self, error: OSError) -> None:
        """The application is gone: abort the stream, unless both sides had finished."""
        # After a whole answer NO_ERROR says "stop sending", and the answer counts (RFC 9113 s8.1).
        self._abort_stream(H2_NO_ERROR if self._local_ended else H2_CANCEL)
        self._end(None if error.errno in GONE else PeerError(f"io error: {error.strerror}"))

    def _deafened(self, error: OSError) -> None:
        """The application takes no more, but may have said something before: carry that first."""
        if self._local_ended or error.errno not in GONE:
            self._local_failed(error)
            return
        self._pending = None
        self._hold(-self._holding)
        self._deaf, self._heard_bytes = error, self.read_bytes
        self._readable = self._hung_up = True
        self.pump()

    def preface(self, data: bytes) -> None:
        """Give the application `data` before anything else; not counted, and not the peer's."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._deafened(error)
            return
        if sent < len(data):
            self._uncounted = len(data) - sent
            self._pending = deque([memoryview(data)[sent:]])
            self._reactor.await_room(self.sock)

    # From the stream to the socket: the tunnel calls these.

    def on_data(self, event: DataReceived) -> None:
        """Give the bytes to the local socket; keep what it does not take."""
        if self._ended is None or self._deaf is not None:
            return
        chunks = event.chunks
        if self._pending is not None:
            keep(self._pending, chunks)
            self._hold(event.size)
            return
        if len(chunks) > PIECES_PER_SEND:
            chunks = [memoryview(b"".join(chunks))]
        try:
            sent = self.sock.send(chunks[0]) if len(chunks) == 1 else self.sock.sendmsg(chunks)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._deafened(error)
            return
        # As `_credit` does; nothing is uncounted where nothing is pending.
        self.written_bytes += sent
        if self._tunnel.core.consume(self._stream, sent):
            self._tunnel.flush_later()
        if sent < event.size:
            self._pending = deque([rest(chunks, sent)])
            self._reactor.await_room(self.sock)
            self._hold(event.size - sent)

    def on_end(self) -> None:
        """Carry the peer's FIN to the application, behind what is pending."""
        self._remote_ended = True
        if self._pending is None and self._ended is not None:
            if self._local_ended:
                self._end(None)  # to close says it, too
            else:
                self._shut_down()

    def on_reset(self, code: int) -> None:
        """Carry the peer's abort to the application; NO_ERROR is an end in good order."""
        if self._ended is None:
            return
        if code == H2_NO_ERROR:
            self._local_ended = True
            if not self._remote_ended:
                self.on_end()
            else:
                self._finish_if_done()
            return
        reset_on_close(self.sock)
        self._end(PeerError(f"peer reset the stream (code {code})"))

    def on_response(self, event: ResponseReceived) -> None:
        """Nothing: the answer came before the relay began."""

    def on_window(self) -> None:
        """Go on sending."""
        self.pump()

    def on_lost(self, error: ZtunnelError) -> None:
        """The connection under the stream is gone: the application sees an abort."""
        if self._ended is not None:
            if not (self._remote_ended and self._local_ended):
                reset_on_close(self.sock)
            self._end(error)

    # Ending.

    def cut(self, error: ZtunnelError) -> None:
        """End both sides now, as aborts: policy or the operator said so."""
        if self._ended is not None:
            reset_on_close(self.sock)
            self._abort_stream(H2_CANCEL)
            self._end(error)

    def _send_pending(self) -> None:
        pending = self._pending
        assert pending is not None
        while pending:
            pieces = [pending[i] for i in range(min(len(pending), PIECES_PER_SEND))]
            try:
                sent = self.sock.sendmsg(pieces)
            except BlockingIOError:
                return
            except OSError as error:
                self._deafened(error)
                return
            self._credit(sent)
            drop(pending, sent)
            self._hold(-min(sent, self._holding))
        self._pending = None
        if self._remote_ended:
            self._shut_down()

    def _hold(self, size: int) -> None:
        """Account for bytes kept here, with the tunnel that bounds their sum."""
        self._holding += size
        self._tunnel.hold(size)

    def _credit(self, size: int) -> None:
        if self._uncounted:
            own = min(self._uncounted, size)
            self._uncounted -= own
            size -= own
        self.written_bytes += size
        tunnel = self._tunnel
        if tunnel.core.consume(self._stream, size):
            tunnel.flush_later()

    def _shut_down(self) -> None:
        try:
            self.sock.shutdown(1)
        except OSError as error:
            if error.errno not in GONE:
                self._local_failed(error)
                return
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._local_ended and self._remote_ended and self._pending is None:
            self._end(None)

    def _abort_stream(self, code: int) -> None:
        if not (self._local_ended and self._remote_ended):
            self._tunnel.core.reset(self._stream, code)
            self._tunnel.flush_later()

    def _end(self, error: ZtunnelError | None) -> None:
        ended = self._ended
        if ended is None:
            return
        self._ended = None
        self._pending = None
        self._hold(-self._holding)
        self._tunnel.forget(self)
        self._reactor.forget(self.sock)
        self.sock.close()
        self._stream.owner = None
        self._tunnel.released()
        ended(error)
