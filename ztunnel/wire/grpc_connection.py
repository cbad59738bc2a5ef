"""Several gRPC calls over one HTTP/2 connection, the client's end, without I/O.

What happens to one call stays with it: a reset, a status, a message that cannot be read. What
happens to the connection ends every call that is under way, except that after a GOAWAY those the
server still serves go on to their end, and the others are refused, safe to make elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from ztunnel.errors import LimitError, TunnelError
from ztunnel.wire.grpc import PING_PAYLOAD, GrpcCall
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.events import (
    DataReceived,
    GoawayReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from ztunnel.wire.hbone.settings import HboneSettings


class GrpcConnection:
    """One connection; every method returns at once and does no I/O."""

    def __init__(self) -> None:
        self.is_over = False  # nothing more will come, and there is nobody to send it to
        self.calls: dict[GrpcCall, None] = {}  # under way, or with something to take; in order
        self._connection = HboneConnection(client=True, settings=HboneSettings())

    @property
    def takes_calls(self) -> bool:
        """Whether the server has not said that it goes away."""
        return not self.is_over and not self._connection.draining

    @property
    def has_news(self) -> bool:
        """Whether any call has something to take, or is over."""
        return self.is_over or any(call.has_news for call in self.calls)

    @property
    def has_more_to_send(self) -> bool:
        """Whether `data_to_send` has something, or will when the server allows it."""
        return bool(self._connection.control) or any(call.waiting for call in self.calls)

    def open(
        self, authority: str, path: str, metadata: Sequence[tuple[str, str]], *, seconds: float
    ) -> GrpcCall:
        """Begin a call; `release` it, whatever became of it.

        Raises:
            LimitError: the server takes no more calls, now or ever.
        """
        if self.is_over:
            raise LimitError("the connection is gone")
        call = GrpcCall(authority, path, metadata, seconds=seconds, connection=self._connection)
        self.calls[call] = None
        return call

    def release(self, call: GrpcCall) -> None:
        """Be done with a call; the server is told if it is not."""
        call.give_up()
        self.calls.pop(call, None)
        self._check_end()

    def ping(self) -> None:
        """Ask for a sign of life; any bytes are one."""
        self._connection.ping(PING_PAYLOAD)

    def data_to_send(self) -> bytes:
        """Take the next bytes to send, of each call a piece; empty if none may be sent now."""
        for call in self.calls:
            call.queue()
        taken, self._connection.control = self._connection.control, bytearray()
        return bytes(taken)

    def receive(self, data: memoryview) -> None:
        """Digest bytes from the server, cut anywhere."""
        try:
            events = self._connection.receive(data)
        except TunnelError as error:
            self.fail("UNAVAILABLE", f"the server breaks HTTP/2: {error}")
            return
        for event in events:
            match event:
                case GoawayReceived():
                    for call in self.calls:
                        call.handle(event)
                case ResponseReceived() | DataReceived() | StreamEnded() | StreamReset():
                    event.stream.owner.handle(event)
                case _:
                    pass
        self._check_end()

    def close(self, reason: str = "the server closed the connection") -> None:
        """Take note that the connection is gone."""
        self.is_over = True
        for call in self.calls:
            call.close(reason)

    def fail(self, status: str, text: str) -> None:
        """End all calls with an error, and the connection with them."""
        self.is_over = True
        for call in self.calls:
            call.fail(status, text)

    def leave(self) -> None:
        """Tell the server that we go away; what is under way is given up."""
        for call in self.calls:
            call.give_up()
        self.is_over = True
        self._connection.goaway()

    def _check_end(self) -> None:
        """A server that goes away and has nothing left to answer waits for us to hang up."""
        if self._connection.draining and not self.calls:
            self.is_over = True
