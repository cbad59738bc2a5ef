from __future__ import annotations

import ssl

import pytest

from tests.support.certs import a_client_context, a_server_context, an_established_pair
from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert
from ztunnel.tls.sealer import REKEY_RECORDS
from ztunnel.tls.ssl_records import SslObjectRecords, describe_ssl_error

OUT = memoryview(bytearray(1 << 20))


def a_pair(*, tls12: bool = False) -> tuple[SslObjectRecords, SslObjectRecords]:
    client = a_client_context(own_records=False, tls12_enabled=tls12)
    if tls12:
        client.ssl_context.maximum_version = ssl.TLSVersion.TLSv1_2
    ends = an_established_pair(client, a_server_context(own_records=False, tls12_enabled=tls12))
    one, other = (end.records for end in ends)
    assert isinstance(one, SslObjectRecords)
    assert isinstance(other, SslObjectRecords)
    return one, other


@pytest.mark.parametrize("tls12", [False, True])
@pytest.mark.parametrize("size", [0, 1, 16384, 300_000])
def test_plaintext_arrives(tls12: bool, size: int) -> None:
    one, other = a_pair(tls12=tls12)
    sealed = one.seal_small(bytes(size))
    assert other.open(memoryview(sealed), OUT) == (len(sealed), size)
    if size:
        buffer = bytearray(b"x" * (size + 1))
        bulk = one.seal_bulk(memoryview(buffer), size)
        assert other.open(bulk, OUT) == (len(bulk), size)
        assert OUT[:size] == buffer[:size]


def test_a_record_may_come_in_pieces() -> None:
    one, other = a_pair()
    sealed = memoryview(one.seal_small(b"hello"))
    for at in range(len(sealed) - 1):
        assert other.open(sealed[at : at + 1], OUT) == (1, 0)
    assert other.open(sealed[-1:], OUT) == (1, 5)


def test_close_notify_ends_reading_but_not_writing() -> None:
    one, other = a_pair()
    other.open(memoryview(one.seal_small(b"bye") + one.close_notify()), OUT)
    assert other.closed
    assert other.open(memoryview(b"junk"), OUT) == (4, 0)
    sealed = other.seal_small(b"still here")
    assert one.open(memoryview(sealed), OUT) == (len(sealed), 10)
    with pytest.raises(TlsError):
        one.seal_small(b"too late")


def test_a_forged_record_is_a_tls_error_with_an_alert() -> None:
    one, other = a_pair()
    forged = bytearray(one.seal_small(b"hello"))
    forged[-1] ^= 1
    with pytest.raises(TlsError) as caught:
        other.open(memoryview(forged), OUT)
    with pytest.raises(TlsError, match="peer sent alert: bad record mac"):
        one.open(memoryview(caught.value.alert), OUT)
    assert other.seal_small(b"what was still to be said") == b""


def test_an_alert_of_choice_becomes_close_notify() -> None:
    one, other = a_pair()
    other.open(memoryview(one.alert(Alert.BAD_CERTIFICATE)), OUT)
    assert other.closed


def test_a_worn_key_retires_the_connection() -> None:
    one, _ = a_pair()
    one.park()
    assert not one.retire
    one._records = REKEY_RECORDS - 1
    one.seal_small(b"x")
    assert one.retire


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("TLSV1_ALERT_UNKNOWN_CA", "peer sent alert: unknown ca (48)"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "peer sent alert: certificate required (116)"),
        ("TLSV1_ALERT_SOMETHING_NEW", "peer sent alert: something new"),
        ("NO_SHARED_CIPHER", "no shared cipher"),
        (None, "unknown error"),
    ],
)
def test_openssl_errors_are_put_into_words(reason: str | None, text: str) -> None:
    error = ssl.SSLError()
    error.reason = reason
    assert describe_ssl_error(error) == text
