"""The record layer of the `ssl` module behind the interface of ours.

For TLS 1.2, for suites and builds where the take-over is not wanted, and as the oracle of tests.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from typing import cast

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert, describe_alert
from ztunnel.tls.sealer import MAX_PLAINTEXT, REKEY_RECORDS

PEER_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(.+)")


def describe_ssl_error(error: ssl.SSLError) -> str:
    """Put an OpenSSL error into words: its reason, or the alert that the peer sent."""
    reason = error.reason or "unknown error"
    if sent := PEER_ALERT.fullmatch(reason):
        name = sent[1]
        if name in Alert.__members__:
            return describe_alert(Alert[name])
        return f"peer sent alert: {name.lower().replace('_', ' ')}"
    words = reason.lower().replace("_", " ")
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{words}: {error.verify_message}"
    return words


class SslObjectRecords:
    """Both directions, kept by an `ssl` object whose handshake is done."""

    __slots__ = ("_broken", "_incoming", "_object", "_outgoing", "_records", "closed")

    def __init__(
        self, ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        self._object = ssl_object
        self._incoming = incoming
        self._outgoing = outgoing
        self._records = 0
        self._broken = False  # the peer broke the protocol: OpenSSL seals no more
        self.closed = False

    @property
    def retire(self) -> bool:
        """Say whether the key is worn: `ssl` cannot send a KeyUpdate."""
        return self._records >= REKEY_RECORDS

    def seal_small(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Seal plaintext of any length; nothing comes out once `open` has failed.

        Raises:
            TlsError: we sent close_notify already.
        """
        if self._broken:
            return b""  # our own layer could seal on, but there is nobody to read it
        rest = memoryview(plaintext)
        self._records += -(-len(rest) // MAX_PLAINTEXT)
        try:
            while rest:
                rest = rest[self._object.write(rest) :]
        except ssl.SSLError as error:
            raise TlsError(f"tls error: {describe_ssl_error(error)}") from error
        return self._outgoing.read()

    def seal_bulk(self, view: memoryview, size: int) -> memoryview:
        """Seal `view[:size]`."""
        return memoryview(self.seal_small(view[:size]))

    def open(self, raw: memoryview, out: memoryview) -> tuple[int, int]:
        """Open the records of `raw` into `out`; all is consumed, as a partial one is kept inside.

        `out` must also hold what an earlier `raw` left behind: 16 KiB more than `raw`.

        Raises:
            TlsError: as `RecordLayer.open`.
        """
        if self.closed:
            return len(raw), 0
        self._incoming.write(raw)
        produced = 0
        try:
            while produced < len(out):
                # With a buffer the result is a count, which the type stubs do not know.
                size = cast("int", self._object.read(len(out) - produced, out[produced:]))
                if not size:
                    self.closed = True
                    break
                produced += size
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._broken = True
            text = describe_ssl_error(error)
            raise TlsError(f"tls error: {text}", alert=self._outgoing.read()) from error
        return len(raw), produced

    def take_reply(self) -> bytes:
        """Give the records owed to the peer."""
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        """Seal the announcement that we send no more; opening goes on."""
        # WantRead says that the peer's own close_notify is still to come.
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self._outgoing.read()

    def alert(self, code: int) -> bytes:  # noqa: ARG002
        """Seal a close_notify: `ssl` cannot send an alert of our choice."""
        return self.close_notify()

    def park(self) -> None:
        """Do nothing: an ssl object keeps its buffers."""
