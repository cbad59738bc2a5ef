"""Sealing TLS 1.3 records (RFC 8446 s5.2) into buffers of our own.

Small plaintexts become fresh bytes. Bulk is sealed from the caller's buffer into one process-wide
ciphertext buffer, never in place: overlapping input and output once gave wrong ciphertext with a
valid tag. The content type must follow the plaintext directly, so for the length of one cipher call
it stands on the byte behind each record's share, which is then put back.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ztunnel.linux.memory import untouched
from ztunnel.tls.alerts import alert_body
from ztunnel.tls.traffic_keys import NONCE_BYTES, TrafficKeys

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION_DATA, HANDSHAKE, ALERT = 23, 22, 21
RECORD_HEADER = struct.Struct(">BHH")  # opaque type, legacy version, length
LEGACY_VERSION = 0x0303
HEADER_BYTES = 5
TAG_BYTES = 16
MAX_PLAINTEXT = 16384
SEALED_EXTRA = 1 + TAG_BYTES  # content type and tag
SLOT_BYTES = HEADER_BYTES + MAX_PLAINTEXT + SEALED_EXTRA
FULL_HEADER = RECORD_HEADER.pack(APPLICATION_DATA, LEGACY_VERSION, MAX_PLAINTEXT + SEALED_EXTRA)

BULK_BYTES_MAX = (1 << 20) + (1 << 16)  # the largest read unit, with room for frame headers
SLOTS = -(-BULK_BYTES_MAX // MAX_PLAINTEXT)

# RFC 8446 s5.5 allows 2**24.5 full records under one AES-GCM key; half a bit less leaves room.
REKEY_RECORDS = 1 << 23
# rustls 0.23 accepts 32 KeyUpdates in the whole life of a connection; we stop well before.
REKEYS_MAX = 24
KEY_UPDATE = b"\x18\x00\x00\x01"


class SealBuffer:
    """The ciphertext buffer of a process: a KeyUpdate's place, then one slot per record.

    What every full record has in common is made once and not for each: the header in its slot, and
    its share of the plaintext, as bulk always comes from the same buffer.
    """

    __slots__ = ("_headed", "_plaintext", "_shares", "slots", "start", "view")

    def __init__(self) -> None:
        self._headed = 0  # so many slots, from the first on, have the header of a full record
        self._plaintext: memoryview | None = None
        self._shares: list[memoryview] = []
        self.start = HEADER_BYTES + len(KEY_UPDATE) + 1 + SEALED_EXTRA
        self.view = untouched(self.start + SLOTS * SLOT_BYTES)
        self.slots = [
            self.view[at + HEADER_BYTES : at + SLOT_BYTES]
            for at in range(self.start, len(self.view), SLOT_BYTES)
        ]

    def lay_out(self, plaintext: memoryview, full: int) -> Iterator[tuple[memoryview, memoryview]]:
        """Make ready for `full` full records; give each one's share of `plaintext` and its slot.

        A share has the byte behind it, too. Whatever then comes into the slot behind the last of
        them may have a header of its own.
        """
        for index in range(self._headed, full):
            at = self.start + index * SLOT_BYTES
            self.view[at : at + HEADER_BYTES] = FULL_HEADER
        self._headed = full
        if plaintext is not self._plaintext:
            self._plaintext, self._shares = plaintext, []
        for at in range(len(self._shares) * MAX_PLAINTEXT, full * MAX_PLAINTEXT, MAX_PLAINTEXT):
            self._shares.append(plaintext[at : at + MAX_PLAINTEXT + 1])
        return zip(self._shares[:full], self.slots, strict=False)


class Sealer(TrafficKeys):
    """Seals our records; the only owner of its keys."""

    __slots__ = ("rekeys",)

    def __init__(self, secret: bytes, suite: str, sequence: int = 0, rekeys: int = 0) -> None:
        super().__init__(secret, suite, sequence)
        self.rekeys = rekeys

    def __getstate__(self) -> tuple[bytes, str, int, int]:
        """Hand the keys over: this object can seal no more."""
        self.awake()
        state = self.secret, self.suite, self.sequence, self.rekeys
        self.retire()
        return state

    def __setstate__(self, state: tuple[bytes, str, int, int]) -> None:
        secret, suite, sequence, rekeys = state
        Sealer.__init__(self, secret, suite, sequence, rekeys)

    def seal(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Seal application data of any length as one or more records, after a due KeyUpdate."""
        size = len(plaintext)
        if size <= MAX_PLAINTEXT and self.sequence < REKEY_RECORDS:
            return self.seal_record(plaintext, b"\x17")
        sealed = []
        whole = memoryview(plaintext)
        for at in range(0, size or 1, MAX_PLAINTEXT):
            if self.sequence >= REKEY_RECORDS:
                sealed.append(self.key_update())
            sealed.append(self.seal_record(whole[at : at + MAX_PLAINTEXT], b"\x17"))
        return b"".join(sealed)

    def seal_record(self, plaintext: bytes | bytearray | memoryview, kind: bytes) -> bytes:
        """Seal at most MAX_PLAINTEXT bytes of content type `kind` as one record."""
        cipher = self.cipher or self.awake()
        sequence = self.sequence
        self.sequence = sequence + 1  # before anything can leave: a nonce is never used twice
        header = RECORD_HEADER.pack(APPLICATION_DATA, LEGACY_VERSION, len(plaintext) + SEALED_EXTRA)
        nonce = (self.iv ^ sequence).to_bytes(NONCE_BYTES, "big")
        return header + cipher.encrypt(nonce, b"".join((plaintext, kind)), header)

    def seal_bulk(self, plaintext: memoryview, size: int, target: SealBuffer) -> memoryview:
        """Seal `plaintext[:size]` into `target`; the result is valid until its next use.

        `plaintext` is writable, longer than `size`, and unchanged afterwards.
        """
        assert 0 < size < len(plaintext)
        assert size <= BULK_BYTES_MAX
        start = target.start
        if self.sequence >= REKEY_RECORDS:
            update = self.key_update()
            start -= len(update)
            target.view[start : target.start] = update
        encrypt_into = (self.cipher or self.awake()).encrypt_into
        full, rest = divmod(size, MAX_PLAINTEXT)
        sequence, iv = self.sequence, self.iv
        self.sequence = sequence + full + (rest > 0)
        view, slots = target.view, target.slots
        for share, slot in target.lay_out(plaintext, full):
            spared, share[MAX_PLAINTEXT] = share[MAX_PLAINTEXT], APPLICATION_DATA
            encrypt_into((iv ^ sequence).to_bytes(NONCE_BYTES, "big"), share, FULL_HEADER, slot)
            share[MAX_PLAINTEXT] = spared
            sequence += 1
        end = target.start + full * SLOT_BYTES
        if rest:
            at = full * MAX_PLAINTEXT
            header = RECORD_HEADER.pack(APPLICATION_DATA, LEGACY_VERSION, rest + SEALED_EXTRA)
            view[end : end + HEADER_BYTES] = header
            nonce = (iv ^ sequence).to_bytes(NONCE_BYTES, "big")
            spared, plaintext[size] = plaintext[size], APPLICATION_DATA
            encrypt_into(
                nonce, plaintext[at : size + 1], header, slots[full][: rest + SEALED_EXTRA]
            )
            plaintext[size] = spared
            end += HEADER_BYTES + rest + SEALED_EXTRA
        return view[start:end]

    def key_update(self, *, request: bool = False) -> bytes:
        """Seal a KeyUpdate under the old keys and go on with new ones (RFC 8446 s4.6.3)."""
        record = self.seal_record(KEY_UPDATE + bytes((request,)), bytes((HANDSHAKE,)))
        self.advance()
        self.rekeys += 1
        return record

    def alert(self, code: int) -> bytes:
        """Seal an alert."""
        return self.seal_record(alert_body(code), bytes((ALERT,)))

    @property
    def is_worn(self) -> bool:
        """Say whether the connection should be drained, as another KeyUpdate is risky."""
        return self.rekeys >= REKEYS_MAX
