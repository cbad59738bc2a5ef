from __future__ import annotations

import pytest

from ztunnel.errors import TlsError
from ztunnel.tls.traffic_keys import TrafficKeys, expand_label

# RFC 8448 s3: server application traffic secret, and the key and iv made from it
SECRET = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
KEY = "9f02283b6c9c07efc26bb9f2ac92e356"
IV = "cf782b88dd83549aadf1e984"


def test_keys_are_derived_as_in_rfc_8448() -> None:
    assert expand_label(SECRET, b"key", 16, "sha256").hex() == KEY
    assert expand_label(SECRET, b"iv", 12, "sha256").hex() == IV


def test_no_output_is_longer_than_one_hash() -> None:
    assert len(expand_label(SECRET, b"key", 32, "sha256")) == 32
    with pytest.raises(AssertionError):
        expand_label(SECRET, b"key", 33, "sha256")


@pytest.mark.parametrize(
    ("suite", "size"), [("TLS_AES_128_GCM_SHA256", 32), ("TLS_AES_256_GCM_SHA384", 48)]
)
def test_an_advance_changes_the_secret_and_starts_to_count_again(suite: str, size: int) -> None:
    keys = TrafficKeys(bytes(size), suite, sequence=9)
    keys.awake()
    keys.advance()
    assert keys.sequence == 0
    assert keys.cipher is None
    assert keys.secret != bytes(size)
    assert len(keys.secret) == size


def test_parked_keys_come_back_the_same() -> None:
    keys = TrafficKeys(SECRET, "TLS_AES_128_GCM_SHA256")
    before = keys.awake().encrypt(bytes(12), b"x", None)
    keys.park()
    assert keys.cipher is None
    assert keys.awake().encrypt(bytes(12), b"x", None) == before


def test_retired_keys_work_no_more() -> None:
    keys = TrafficKeys(SECRET, "TLS_AES_128_GCM_SHA256")
    keys.awake()
    keys.retire()
    with pytest.raises(TlsError, match="handed over"):
        keys.awake()
