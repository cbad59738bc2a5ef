"""The state of one direction of a TLS 1.3 connection (RFC 8446 s5.3, s7.2, s7.3).

It is a secret, a suite and a sequence number: about a hundred bytes, which can be parked, or handed
to a successor process. The cipher object made of them (2.4 KiB, 10 us) appears on first use.
"""

from __future__ import annotations

import hmac
import struct
from functools import lru_cache

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert

# suite -> key bytes, hash; only AES-GCM, as in the reference (dataplane.md 7.1)
SUITES = {"TLS_AES_128_GCM_SHA256": (16, "sha256"), "TLS_AES_256_GCM_SHA384": (32, "sha384")}
NONCE_BYTES = 12


@lru_cache
def _info(label: bytes, length: int) -> bytes:
    """Give what is expanded, for the one block that every length of ours fits into."""
    full = b"tls13 " + label
    return struct.pack(">HB", length, len(full)) + full + b"\0\1"


def expand_label(secret: bytes, label: bytes, length: int, digest: str) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446 s7.1), of at most one hash."""
    block = hmac.digest(secret, _info(label, length), digest)
    assert length <= len(block)
    return block[:length]


class TrafficKeys:
    """One direction: `sequence` is the number of the next record."""

    __slots__ = ("cipher", "iv", "secret", "sequence", "suite")

    def __init__(self, secret: bytes, suite: str, sequence: int = 0) -> None:
        assert suite in SUITES
        self.secret = secret
        self.suite = suite
        self.sequence = sequence
        self.iv = 0
        self.cipher: AESGCM | None = None

    def awake(self) -> AESGCM:
        """Give the cipher object, making it if need be."""
        if self.cipher is None:
            if not self.secret:
                # Two owners of one key would use a nonce twice, which breaks AES-GCM entirely.
                raise TlsError("these keys were handed over", code=Alert.INTERNAL_ERROR)
            key_bytes, digest = SUITES[self.suite]
            iv = expand_label(self.secret, b"iv", NONCE_BYTES, digest)
            self.iv = int.from_bytes(iv, "big")
            self.cipher = AESGCM(expand_label(self.secret, b"key", key_bytes, digest))
        return self.cipher

    def park(self) -> None:
        """Drop what the secret gives again, until the next use."""
        self.cipher = None
        self.iv = 0

    def advance(self) -> None:
        """Go on with the next generation of keys, as KeyUpdate wants it."""
        digest = SUITES[self.suite][1]
        self.secret = expand_label(self.secret, b"traffic upd", len(self.secret), digest)
        self.sequence = 0
        self.cipher = None

    def retire(self) -> None:
        """Forget the secret: these keys now belong to someone else."""
        self.secret = b""
        self.cipher = None
