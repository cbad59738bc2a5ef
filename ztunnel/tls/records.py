"""The record layer of an established connection: plaintext to records and back.

Two classes share one interface: `Tls13Records` here, our own (performance.md 14), and
`SslObjectRecords`, the `ssl` module's.
"""

from __future__ import annotations

from typing import Protocol

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert
from ztunnel.tls.opener import Opener
from ztunnel.tls.resumption import TicketTaker
from ztunnel.tls.sealer import SealBuffer, Sealer


class RecordLayer(Protocol):
    """Both directions of one connection. Whatever a method returns must be sent, in that order."""

    @property
    def closed(self) -> bool:
        """Say whether the peer sent close_notify; an end of the stream without it is a cut."""

    @property
    def retire(self) -> bool:
        """Say whether this connection should be drained and replaced."""

    def seal_small(self, plaintext: bytes | bytearray | memoryview) -> bytes | memoryview:
        """Seal plaintext of any length."""

    def seal_bulk(self, view: memoryview, size: int) -> memoryview:
        """Seal `view[:size]`; the result is valid until the next seal on any layer.

        `view` is writable, longer than `size` by at least one byte, and holds the same bytes
        afterwards. `size` is at most `BULK_BYTES_MAX`.
        """

    def open(self, raw: memoryview, out: memoryview) -> tuple[int, int]:
        """Open the whole records of `raw` into `out`; give bytes consumed and produced.

        `out` is at least as long as `raw` and does not overlap it.

        Raises:
            TlsError: the peer broke the protocol, then `alert` holds what to send it; or the peer
                sent a fatal alert, then the message names it and `alert` is empty.
        """

    def take_reply(self) -> bytes:
        """Give records owed to the peer because of what was opened; usually none."""

    def close_notify(self) -> bytes:
        """Seal the announcement that we send no more."""

    def alert(self, code: int) -> bytes:
        """Seal a fatal alert."""

    def park(self) -> None:
        """Drop what can be rebuilt on the next use, as the connection is idle."""


class Tls13Records:
    """Our own record layer."""

    __slots__ = ("_buffer", "_opener", "_sealer", "_taker")

    def __init__(
        self,
        sealer: Sealer,
        opener: Opener,
        buffer: SealBuffer,
        taker: TicketTaker | None = None,
    ) -> None:
        self._taker = taker
        self._sealer = sealer
        self._opener = opener
        self._buffer = buffer

    @property
    def closed(self) -> bool:
        """Say whether the peer sent close_notify."""
        return self._opener.closed

    @property
    def retire(self) -> bool:
        """Say whether our KeyUpdates come near to what peers tolerate."""
        return self._sealer.is_worn

    def seal_small(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Seal plaintext of any length; the result is the caller's own."""
        return self._sealer.seal(plaintext)

    def seal_bulk(self, view: memoryview, size: int) -> memoryview:
        """Seal `view[:size]` into the process-wide buffer; valid until the next `seal_bulk`."""
        return self._sealer.seal_bulk(view, size, self._buffer)

    def open(self, raw: memoryview, out: memoryview) -> tuple[int, int]:
        """Open the whole records of `raw` into `out`.

        Raises:
            TlsError: as `RecordLayer.open`.
        """
        if self._taker is not None:
            taker, self._taker = self._taker, None
            taker.take(raw)
        try:
            return self._opener.open(raw, out)
        except TlsError as error:
            if error.code is not None:
                error.alert = self.alert(error.code)
            raise

    def take_reply(self) -> bytes:
        """Give the KeyUpdate that the peer asked for, if any; one answers many requests."""
        if not self._opener.update_requested:
            return b""
        self._opener.update_requested = False
        return self._sealer.key_update()

    def key_update(self, *, request: bool = False) -> bytes:
        """Seal a KeyUpdate out of turn; peers tolerate few of them (performance.md 14, trap 1)."""
        return self._sealer.key_update(request=request)

    def close_notify(self) -> bytes:
        """Seal the announcement that we send no more; opening goes on."""
        return self._sealer.alert(Alert.CLOSE_NOTIFY)

    def alert(self, code: int) -> bytes:
        """Seal a fatal alert."""
        return self._sealer.alert(code)

    def park(self) -> None:
        """Drop the two cipher objects, 5 KiB, until the next use."""
        self._sealer.park()
        self._opener.park()

    def directions(self) -> tuple[Sealer, Opener]:
        """Give the state of both directions, for a successor process to go on with.

        Pickling the sealer disables it here: a nonce must never be used by two processes.
        """
        return self._sealer, self._opener
