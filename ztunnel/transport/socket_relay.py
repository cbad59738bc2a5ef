"""Joining two plain sockets: traffic that passes through, in the clear on both sides.

As in `relay`, nothing is async: what one socket does not take is kept, and nothing more is read
from the other until it has gone, so a slow reader holds its own sender only.
"""

from __future__ import annotations

import errno
import math
from typing import TYPE_CHECKING

from ztunnel.errors import PeerError
from ztunnel.linux.sockopt import reset_on_close
from ztunnel.transport.buffers import PLAIN, UNIT_FIRST, grown
from ztunnel.transport.reactor import BROKEN, HUNG_UP, READABLE, URGENT, WRITABLE
from ztunnel.transport.sockets import GONE
from ztunnel.transport.splice import WORTH_BYTES, SplicePipe

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ztunnel.errors import ZtunnelError
    from ztunnel.transport.reactor import Reactor

READS_PER_TURN = 4  # performance.md 11


class SocketSide:
    """One socket of a pair: what it receives goes to its peer side."""

    __slots__ = (
        "_hung_up",
        "_pair",
        "_pending",
        "_pipe",
        "_readable",
        "_worth_bytes",
        "deaf",
        "ended",
        "heard_bytes",
        "moved_bytes",
        "peer",
        "sock",
        "unit",
    )

    def __init__(self, pair: SocketRelay, sock: socket.socket) -> None:
        self.sock = sock
        self.peer: SocketSide = self  # the pair joins the two
        self.moved_bytes = 0  # received here and taken by the peer's socket
        self.ended = False  # a FIN came and was passed on
        self.deaf: OSError | None = None  # why it takes no more
        self.heard_bytes = 0  # what it had said by then
        self.unit = UNIT_FIRST
        self._pair = pair
        self._pending: memoryview | None = None  # received here, not yet taken by the peer
        self._pipe: SplicePipe | None = None  # set once this direction has shown itself busy
        self._worth_bytes: float = WORTH_BYTES
        self._readable = self._hung_up = False

    def on_event(self, events: int) -> None:
        """Move what can be moved, both ways."""
        if self._pair.over:
            return
        if events & WRITABLE:
            self.peer.resume()
        if events & HUNG_UP:
            self._hung_up = True
            if events & URGENT:
                self._worth_bytes = math.inf  # splice(2) never gets past a mark
            if events & BROKEN and self._is_stuck:
                # A peer that does not read would keep us from ever seeing the abort.
                self._pair.aborted(ConnectionResetError(errno.ECONNRESET, "reset"))
                return
        if events & (READABLE | HUNG_UP):
            self._readable = True
            self.pump()

    def fail(self, error: Exception) -> None:
        """End because of a bug of ours."""
        self._pair.cut(PeerError(f"internal error: {error}"))

    def resume(self) -> None:
        """Send what the peer's socket did not take before, then go on."""
        if self._pipe is not None:
            if self._pipe.held and self._empty_pipe(self._pipe):
                self.pump()
        elif self._pending is not None and self._send(self._pending):
            self.pump()

    def close_pipe(self) -> None:
        """Let go of the pipe, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def pump(self) -> None:
        """Read here and send there until one of them would block or the turn is used up."""
        for _ in range(READS_PER_TURN):
            if not self._readable or self._is_held or self._pair.over:
                return
            if self.moved_bytes >= self._worth_bytes:
                self._splice()
                return
            self.close_pipe()
            try:
                size = self.sock.recv_into(PLAIN, self.unit)
            except BlockingIOError:
                self._readable = False
                return
            except OSError as error:
                self._pair.aborted(error)
                return
            if not size:
                self._pass_on_end()
                return
            if size < self.unit and not self._hung_up:
                self._readable = False
            self.unit = grown(self.unit, size)
            self._send(PLAIN[:size])
        self._pair.reactor.again(self)

    def _splice(self) -> None:
        """Move bytes inside the kernel from now on; if there can be no pipe, try again later."""
        if self._pipe is None:
            self._pipe = SplicePipe.make()
        if self._pipe is None:
            self._worth_bytes = self.moved_bytes * 2
            self._pair.reactor.again(self)
        elif self._fill_pipe(self._pipe) and self._empty_pipe(self._pipe):
            self._pair.reactor.again(self)

    def _fill_pipe(self, pipe: SplicePipe) -> bool:
        try:
            taken = pipe.fill(self.sock.fileno())
        except BlockingIOError:
            self._readable = False
            return False
        except OSError as error:
            self._pair.aborted(error)
            return False
        if not taken:
            self._pass_on_end()
        return bool(taken)

    def _empty_pipe(self, pipe: SplicePipe) -> bool:
        while pipe.held:
            try:
                self.moved_bytes += pipe.drain(self.peer.sock.fileno())
            except BlockingIOError:
                return False
            except OSError as error:
                self.close_pipe()
                self._pair.deafened(self.peer, error)
                return False
        return True

    def _send(self, data: memoryview) -> bool:
        try:
            sent = self.peer.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._pending = None
            self._pair.deafened(self.peer, error)
            return False
        self.moved_bytes += sent
        if sent == len(data):
            self._pending = None
            return True
        # `data` may lie in the shared buffer: keep a copy of what is left.
        self._pending = memoryview(bytes(data[sent:]))
        return False

    @property
    def _is_held(self) -> bool:
        """Whether nothing more is to be read: it has ended, or its peer takes no more."""
        return self.ended or self._is_stuck or self.peer.deaf is not None

    @property
    def _is_stuck(self) -> bool:
        """Whether what was read has not gone yet."""
        pipe = self._pipe
        return self._pending is not None or (pipe is not None and pipe.held > 0)

    def drain(self, error: OSError) -> None:
        """Take no more, but pass on what was said before."""
        self.deaf, self.heard_bytes = error, self.moved_bytes
        self._readable = self._hung_up = True
        self.pump()

    def _pass_on_end(self) -> None:
        if self.deaf is not None:
            self._pair.drained(self.deaf, said_more=self.moved_bytes > self.heard_bytes)
            return
        self.ended = True
        try:
            self.peer.sock.shutdown(1)
        except OSError as error:
            if error.errno not in GONE:
                self._pair.aborted(error)
                return
        self._pair.finish_if_done()


class SocketRelay:
    """Two plain sockets joined: `downstream` called us, `upstream` is whom we called."""

    __slots__ = ("_ended", "downstream", "reactor", "upstream")

    def __init__(
        self,
        reactor: Reactor,
        downstream: socket.socket,
        upstream: socket.socket,
        ended: Callable[[ZtunnelError | None], None],
    ) -> None:
        self.reactor = reactor
        self._ended: Callable[[ZtunnelError | None], None] | None = ended
        self.downstream = SocketSide(self, downstream)
        self.upstream = SocketSide(self, upstream)
        self.downstream.peer = self.upstream
        self.upstream.peer = self.downstream

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._ended is None

    @property
    def sent_bytes(self) -> int:
        """Return the bytes moved from downstream to upstream."""
        return self.downstream.moved_bytes

    @property
    def received_bytes(self) -> int:
        """Return the bytes moved from upstream to downstream."""
        return self.upstream.moved_bytes

    @property
    def is_half_open(self) -> bool:
        """Whether one end has finished and the other has not."""
        return self.downstream.ended != self.upstream.ended

    def cut(self, error: ZtunnelError) -> None:
        """End both sides now, as aborts."""
        self._end(error, abort=True)

    def aborted(self, error: OSError) -> None:
        """One side reset or vanished: the other side sees the same, which is not a failure."""
        gone = error.errno in GONE
        self._end(None if gone else PeerError(f"io error: {error.strerror}"), abort=True)

    def deafened(self, side: SocketSide, error: OSError) -> None:
        """`side` takes no more, but may have said something before: pass that on first."""
        if side.ended:
            self._end(None, abort=False)
        elif error.errno in GONE:
            side.drain(error)
        else:
            self.aborted(error)

    def drained(self, error: OSError, *, said_more: bool) -> None:
        """Whoever takes no more has said all: that counts as an end, silence as an abort."""
        if said_more:
            self._end(None, abort=False)
        else:
            self.aborted(error)

    def finish_if_done(self) -> None:
        """End in good order when both directions have."""
        if self.downstream.ended and self.upstream.ended:
            self._end(None, abort=False)

    def _end(self, error: ZtunnelError | None, *, abort: bool) -> None:
        ended = self._ended
        if ended is None:
            return
        self._ended = None
        for side in (self.downstream, self.upstream):
            if abort:
                reset_on_close(side.sock)
            side.close_pipe()
            self.reactor.forget(side.sock)
            side.sock.close()
        ended(error)
