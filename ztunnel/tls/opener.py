"""Opening TLS 1.3 records (RFC 8446 s5.2) into a contiguous plaintext buffer.

How it works: the loop of `open` decrypts one record after another, each right behind the
application data of the one before, so that the content type and tag of a record are overwritten by
the next. A record that is anything but plain application data goes to `_settle`, which takes off
padding and handles alerts and handshake messages. A peer may send only so many records in a row
that carry no application data: they cost us work and bring nothing.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert, describe_alert
from ztunnel.tls.sealer import (
    ALERT,
    APPLICATION_DATA,
    HANDSHAKE,
    HEADER_BYTES,
    MAX_PLAINTEXT,
    RECORD_HEADER,
    SEALED_EXTRA,
    TAG_BYTES,
)
from ztunnel.tls.traffic_keys import NONCE_BYTES, TrafficKeys

MAX_CIPHERTEXT = MAX_PLAINTEXT + 256  # RFC 8446 s5.2
# BoringSSL and rustls count KeyUpdates to 32; we count everything that is not application data.
BARREN_RECORDS_MAX = 32
MESSAGE_HEADER_BYTES = 4
MESSAGE_BYTES_MAX = 1 << 16  # the largest NewSessionTicket we would skip
NEW_SESSION_TICKET, KEY_UPDATE = 4, 24


class Opener(TrafficKeys):
    """Opens the peer's records."""

    __slots__ = ("_message", "barren", "closed", "tickets", "update_requested", "updates")

    def __init__(self, secret: bytes, suite: str, sequence: int = 0) -> None:
        super().__init__(secret, suite, sequence)
        self.closed = False  # the peer sent close_notify
        self.update_requested = False  # we owe a KeyUpdate
        self.updates = 0
        self.tickets = 0
        self.barren = 0  # records since the last application data
        self._message = b""  # the beginning of a handshake message

    def __getstate__(self) -> tuple[bytes, str, int, bool, bool, int, bytes]:
        """Give everything a successor needs; unlike a sealer's, these keys stay usable."""
        flags = self.closed, self.update_requested
        return self.secret, self.suite, self.sequence, *flags, self.barren, self._message

    def __setstate__(self, state: tuple[bytes, str, int, bool, bool, int, bytes]) -> None:
        Opener.__init__(self, *state[:3])
        self.closed, self.update_requested, self.barren, self._message = state[3:]

    def open(self, raw: memoryview, out: memoryview) -> tuple[int, int]:
        """Open all whole records of `raw` into `out`; give bytes consumed and produced.

        `out` holds at least as much as `raw` and does not overlap it. A record that fails to open
        does not use up a sequence number.

        Raises:
            TlsError: the peer broke the protocol (`code` says how) or sent a fatal alert.
        """
        if self.closed:
            return len(raw), 0  # RFC 8446 s6.1: what follows a close_notify is ignored
        try:
            return self._open_all(raw, out)
        except InvalidTag:
            raise TlsError("bad record MAC", code=Alert.BAD_RECORD_MAC) from None

    def _open_all(self, raw: memoryview, out: memoryview) -> tuple[int, int]:
        decrypt_into = (self.cipher or self.awake()).decrypt_into
        iv, unpack, size = self.iv, RECORD_HEADER.unpack_from, len(raw)
        at = produced = fruitful = 0
        while size - at >= HEADER_BYTES:
            kind, _, length = unpack(raw, at)
            end = at + HEADER_BYTES + length
            if kind != APPLICATION_DATA or not SEALED_EXTRA <= length <= MAX_CIPHERTEXT:
                raise _bad_header(kind, length)
            if end > size:
                break
            body = at + HEADER_BYTES
            last = produced + length - SEALED_EXTRA  # where the content type comes to lie
            nonce = (iv ^ self.sequence).to_bytes(NONCE_BYTES, "big")
            decrypt_into(nonce, raw[body:end], raw[at:body], out[produced : last + 1])
            self.sequence += 1
            at = end
            if out[last] == APPLICATION_DATA and produced < last and not self._message:
                if last - produced > MAX_PLAINTEXT:
                    raise TlsError("plaintext too long", code=Alert.RECORD_OVERFLOW)
                produced = last
                continue
            if produced > fruitful:
                self.barren, fruitful = 0, produced
            produced = self._settle(out, produced, last)
            if self.closed:
                return size, produced
            decrypt_into = (self.cipher or self.awake()).decrypt_into
            iv = self.iv
        if produced > fruitful:
            self.barren = 0
        return at, produced

    def _settle(self, out: memoryview, start: int, last: int) -> int:
        """Handle the record whose inner plaintext is `out[start:last + 1]`; give the new end."""
        while last >= start and not out[last]:
            last -= 1
        if last < start:
            raise TlsError("record without a content type", code=Alert.UNEXPECTED_MESSAGE)
        kind, size = out[last], last - start
        if size > MAX_PLAINTEXT:
            raise TlsError("plaintext too long", code=Alert.RECORD_OVERFLOW)
        if self._message and kind != HANDSHAKE:
            raise TlsError("interleaved handshake message", code=Alert.UNEXPECTED_MESSAGE)
        if kind == APPLICATION_DATA and size:
            return last
        self.barren += 1
        if self.barren > BARREN_RECORDS_MAX:
            raise TlsError("too many records without data", code=Alert.UNEXPECTED_MESSAGE)
        if kind == ALERT:
            self._alert(bytes(out[start:last]))
        elif kind == HANDSHAKE and size:
            self._handshake(bytes(out[start:last]))
        elif kind != APPLICATION_DATA:
            raise TlsError(f"unexpected content type {kind}", code=Alert.UNEXPECTED_MESSAGE)
        return start

    def _alert(self, body: bytes) -> None:
        if len(body) != len(("level", "description")):
            raise TlsError("malformed alert", code=Alert.DECODE_ERROR)
        description = body[1]  # the level means nothing any more (RFC 8446 s6)
        if description == Alert.CLOSE_NOTIFY:
            self.closed = True
        elif description != Alert.USER_CANCELED:
            raise TlsError(describe_alert(description))

    def _handshake(self, fragment: bytes) -> None:
        pending = self._message + fragment
        while len(pending) >= MESSAGE_HEADER_BYTES:
            length = int.from_bytes(pending[1:4], "big")
            if length > MESSAGE_BYTES_MAX:
                raise TlsError("handshake message too long", code=Alert.DECODE_ERROR)
            end = MESSAGE_HEADER_BYTES + length
            if len(pending) < end:
                break
            kind, body, pending = pending[0], pending[MESSAGE_HEADER_BYTES:end], pending[end:]
            if kind == KEY_UPDATE:
                self._key_update(body, is_last=not pending)
            elif kind == NEW_SESSION_TICKET:
                self.tickets += 1  # dropped: we do not resume
            else:
                raise TlsError(f"handshake message {kind}", code=Alert.UNEXPECTED_MESSAGE)
        self._message = pending

    def _key_update(self, body: bytes, *, is_last: bool) -> None:
        if len(body) != 1:
            raise TlsError("malformed KeyUpdate", code=Alert.DECODE_ERROR)
        if body[0] > 1:
            raise TlsError("illegal KeyUpdate", code=Alert.ILLEGAL_PARAMETER)
        if not is_last:
            # RFC 8446 s5.1: a message right before a key change ends its record.
            raise TlsError("KeyUpdate inside a record", code=Alert.UNEXPECTED_MESSAGE)
        self.updates += 1
        self.update_requested |= body[0] == 1
        self.advance()


def _bad_header(kind: int, length: int) -> TlsError:
    """Say what is wrong with a record's header."""
    if kind != APPLICATION_DATA:
        return TlsError(f"unexpected record type {kind}", code=Alert.UNEXPECTED_MESSAGE)
    if length > MAX_CIPHERTEXT:
        return TlsError("record too long", code=Alert.RECORD_OVERFLOW)
    code = Alert.DECODE_ERROR if length < TAG_BYTES else Alert.UNEXPECTED_MESSAGE
    return TlsError("record too short", code=code)
