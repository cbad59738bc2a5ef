"""The TLS handshake: driven by the `ssl` module, then taken over (performance.md 14).

How it works: bytes are cut into records here, and all that are whole go to the ssl object at once.
It reads one record at a time and none more than it needs, so when it is done, what it has not read
is the application's and comes back; that this begins with a record is checked. The sequence numbers
are then known: 0, except for a server that sent tickets, which are records under the application
keys already.
"""

from __future__ import annotations

import _ssl
import ssl
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from sys import intern

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert, plaintext_alert
from ztunnel.tls.client_hello import parse_client_hello, whole_message
from ztunnel.tls.context import ALPN, TlsContext
from ztunnel.tls.keylog import LABELS
from ztunnel.tls.opener import Opener
from ztunnel.tls.records import RecordLayer, Tls13Records
from ztunnel.tls.resumption import TicketTaker
from ztunnel.tls.sealer import APPLICATION_DATA, HANDSHAKE, HEADER_BYTES, Sealer
from ztunnel.tls.ssl_records import SslObjectRecords, describe_ssl_error
from ztunnel.tls.traffic_keys import SUITES
from ztunnel.tls.verify import PeerCertificate

RECEIVED_BYTES_MAX = 128 * 1024  # certificates of a chain, with room; a peer must not fill memory
RECORD_BYTES_MAX = 16384 + 2048  # RFC 5246 s6.2.3; TLS 1.3 allows less, which OpenSSL checks
RECORD_TYPES = range(20, 24)
LEGACY_MAJOR = 3  # the first byte of the version in every record header
TLS13 = "TLSv1.3"
# Suites of TLS 1.3 and 1.2 that we accept, by number: a client must offer one (RFC 8446 B.4, 5289)
AES_GCM_SUITES = frozenset({0x1301, 0x1302, 0xC02B, 0xC02C, 0xC02F, 0xC030})


@dataclass(frozen=True, slots=True, kw_only=True)
class Established:
    """What a finished handshake leaves; `leftover` is to be opened before anything else."""

    records: RecordLayer
    peer: PeerCertificate
    leftover: bytes
    alpn: str | None
    cipher: str
    version: str
    resumed: bool


class Handshake:
    """One handshake, either role. A client is started by `receive(b"")`."""

    __slots__ = (
        "_context",
        "_hello",
        "_incoming",
        "_object",
        "_outgoing",
        "_randoms",
        "_raw",
        "_received",
        "_resume",
        "_sealed_records",
        "_secrets",
        "_secured",
        "_started",
        "_to_send",
        "done",
    )

    def __init__(self, context: TlsContext, *, server_side: bool, resume: Hashable = None) -> None:
        """Begin; `resume` names the peer whose last session a client may resume, None = none."""
        assert context.server_side is server_side
        self._resume = resume
        sessions = context.sessions
        session = None if sessions is None or resume is None else sessions.get(resume)
        self.done = False
        self._context = context
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.ssl_context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, session=session
        )
        self._hello: bytearray | None = bytearray() if server_side else None
        self._raw = b""  # the beginning of a record
        self._received = 0
        self._started = server_side
        self._secured = False  # the peer may expect encrypted records: no more plaintext alerts
        self._sealed_records = 0  # by us, under the application keys
        self._secrets: dict[bytes, bytes] = {}
        self._randoms: set[bytes] = set()
        self._to_send = b""
        context.key_log.drain()  # what another user of the context left behind is not ours

    def receive(self, data: bytes | memoryview) -> bytes:
        """Feed bytes from the wire; give the bytes to send.

        Raises:
            TlsError: the handshake failed. Send the error's `alert` and close; `data_to_send`
                would give the same bytes.
        """
        assert not self.done
        try:
            self._advance(bytes(data))
        except ssl.SSLError as exc:
            self._to_send += self._outgoing.read()
            raise self._failure(describe_ssl_error(exc)) from exc
        except TlsError as exc:
            if exc.code is not None and not self._secured:
                self._to_send += plaintext_alert(exc.code)
            raise self._failure(str(exc)) from exc
        return self.data_to_send()

    def data_to_send(self) -> bytes:
        """Take what must still go to the peer; after a failure, the alert."""
        taken, self._to_send = self._to_send, b""
        return taken

    def finish(self) -> Established:
        """Hand over the established connection; once, after `done`.

        Raises:
            TlsError: the result is not one we accept: not AES-GCM, another protocol than `h2`, an
                unreadable certificate. `alert` holds what to send before closing.
            RevokedError: a certificate of the peer's chain has been taken back.
        """
        assert self.done
        negotiated, version = self._object.cipher(), self._object.version()
        assert negotiated is not None
        assert version is not None
        # Each tunnel keeps both names for as long as it lives, and they are always the same few.
        cipher, version = intern(negotiated[0]), intern(version)
        alpn = self._object.selected_alpn_protocol()
        try:
            peer = PeerCertificate.parse(self._object.getpeercert(binary_form=True) or b"")
            records = self._records(cipher, version)
        except TlsError as exc:
            self._to_send += self._ssl_records().close_notify()
            raise self._failure(str(exc)) from exc
        leftover, self._raw = self._raw, b""
        return Established(
            records=records,
            peer=self._not_revoked(peer, records),
            leftover=leftover,
            alpn=alpn,
            cipher=cipher,
            version=version,
            resumed=bool(self._object.session_reused),
        )

    def _advance(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > RECEIVED_BYTES_MAX:
            raise TlsError("handshake too long", code=Alert.UNEXPECTED_MESSAGE)
        if not self._started:
            self._started = True
            self._step()
        raw = self._raw + data if self._raw else data
        ends = self._whole_records(raw)
        if not ends:
            self._raw = raw
            return
        self._incoming.write(raw[: ends[-1]])
        self._step()
        unread = self._incoming.pending if self.done else 0
        if unread and ends[-1] - unread not in ends:
            raise TlsError("handshake ended within a record", code=Alert.INTERNAL_ERROR)
        self._incoming.read(unread)
        self._raw = raw[ends[-1] - unread :]

    def _whole_records(self, raw: bytes) -> list[int]:
        """Give where each whole record ends; see what a client offers on the way.

        Raises:
            TlsError: these are no records, or the client offers nothing we speak.
        """
        ends: list[int] = []
        at = 0
        while end := _record_end(raw, at):
            if self._hello is not None and raw[at] == HANDSHAKE:
                self._inspect(raw[at + HEADER_BYTES : end])
            ends.append(end)
            at = end
        return ends

    def _step(self) -> None:
        """Let the ssl object digest what it has; collect its output and secrets."""
        try:
            self._object.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        finally:
            for label, random, secret in self._context.key_log.drain():
                self._secrets[label] = secret
                self._randoms.add(random)
        written = self._outgoing.read()
        self._to_send += written
        if self._context.server_side:
            self._secured = self._secured or bool(written)
            if self.done:
                self._sealed_records = _encrypted_records(written)  # session tickets
        else:
            self._secured = self._received > 0

    def _inspect(self, fragment: bytes) -> None:
        """Refuse a ClientHello that offers nothing we speak."""
        assert self._hello is not None
        self._hello += fragment
        if not whole_message(self._hello):
            return
        offer = parse_client_hello(bytes(self._hello))
        self._hello = None
        if offer.protocols is not None and ALPN.encode() not in offer.protocols:
            raise TlsError(
                f"client does not offer {ALPN}, but other protocols",
                code=Alert.NO_APPLICATION_PROTOCOL,
            )
        if AES_GCM_SUITES.isdisjoint(offer.suites):
            raise TlsError("client does not offer AES-GCM", code=Alert.HANDSHAKE_FAILURE)

    def _records(self, cipher: str, version: str) -> RecordLayer:
        if "GCM" not in cipher:
            # OpenSSL offers ChaCha20 in TLS 1.3 whatever we say, so a server may pick it.
            raise TlsError(f"peer chose {cipher}, we accept only AES-GCM")
        if not (self._context.own_records and version == TLS13 and cipher in SUITES):
            return self._ssl_records()
        ours, theirs = LABELS if not self._context.server_side else LABELS[::-1]
        if len(self._randoms) != 1 or len(self._secrets) != len(LABELS):
            # Someone else used the key log during this handshake: never guess a key.
            raise TlsError("traffic secrets are not known for sure", code=Alert.INTERNAL_ERROR)
        return Tls13Records(
            Sealer(self._secrets[ours], cipher, self._sealed_records),
            Opener(self._secrets[theirs], cipher),
            self._context.seal_buffer,
            self._taker(),
        )

    def _not_revoked(self, peer: PeerCertificate, records: RecordLayer) -> PeerCertificate:
        """Judge the chain, which only now can be had; without revocation lists there is no cost."""
        revocations = self._context.revocations
        if revocations is None:
            return peer
        try:
            return peer.checked(verified_chain(self._object), revocations)
        except TlsError as exc:
            self._to_send += records.alert(exc.code or Alert.CERTIFICATE_UNKNOWN)
            raise self._failure(str(exc), type(exc)) from exc

    def _taker(self) -> TicketTaker | None:
        sessions = self._context.sessions
        if sessions is None or self._resume is None:
            return None
        return TicketTaker(self._object, self._incoming, sessions, self._resume)

    def _ssl_records(self) -> SslObjectRecords:
        return SslObjectRecords(self._object, self._incoming, self._outgoing)

    def _failure(self, text: str, kind: type[TlsError] = TlsError) -> TlsError:
        return kind(f"tls handshake error: {text}", alert=self._to_send)


def verified_chain(ssl_object: ssl.SSLObject) -> list[bytes]:
    """Give the path that OpenSSL verified: DER, leaf first, anchor last."""
    if sys.version_info >= (3, 13):
        chain = ssl_object.get_verified_chain()
    else:
        # Public only from Python 3.13; the private method is there since 3.10.
        found = ssl_object._sslobj.get_verified_chain()  # type: ignore[attr-defined]  # noqa: SLF001
        chain = [certificate.public_bytes(_ssl.ENCODING_DER) for certificate in found]
    return chain


def _record_end(raw: bytes, at: int) -> int:
    """Give the offset behind the record at `at`, or 0 if it is not all there yet.

    Raises:
        TlsError: this is no record; found out early, as plaintext on the wrong port is common.
    """
    left = len(raw) - at
    if left > 0 and (raw[at] not in RECORD_TYPES or (left > 1 and raw[at + 1] != LEGACY_MAJOR)):
        raise TlsError("peer does not speak TLS", code=Alert.UNEXPECTED_MESSAGE)
    if left < HEADER_BYTES:
        return 0
    length = raw[at + 3] << 8 | raw[at + 4]
    if length > RECORD_BYTES_MAX:
        raise TlsError("record too long", code=Alert.RECORD_OVERFLOW)
    return at + HEADER_BYTES + length if left >= HEADER_BYTES + length else 0


def _encrypted_records(written: bytes) -> int:
    """Count the encrypted records in output of our own."""
    at = count = 0
    while at < len(written):
        count += written[at] == APPLICATION_DATA
        at += HEADER_BYTES + int.from_bytes(written[at + 3 : at + HEADER_BYTES], "big")
    return count
