from __future__ import annotations

import ssl

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert
from ztunnel.tls.client_hello import ClientOffer, parse_client_hello, whole_message


def a_hello(*protocols: str) -> bytes:
    """Give a real ClientHello without its record header."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()[5:]


def parsed(data: bytes) -> ClientOffer | int | None:
    """Give the offer, or the code of the alert."""
    try:
        return parse_client_hello(data)
    except TlsError as error:
        return error.code


def test_the_offer_of_a_real_client_is_read() -> None:
    offer = parse_client_hello(a_hello("http/1.1", "h2"))
    assert offer.protocols == (b"http/1.1", b"h2")
    assert {0x1301, 0x1302} <= set(offer.suites)


def test_a_client_without_alpn_is_told_from_one_with() -> None:
    assert parse_client_hello(a_hello()).protocols is None


def test_a_hello_without_extensions_is_read() -> None:
    body = b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"
    hello = b"\x01" + len(body).to_bytes(3, "big") + body
    assert parse_client_hello(hello).suites == (0x1301,)


def test_a_message_is_whole_at_its_last_byte() -> None:
    hello = a_hello("h2")
    assert [whole_message(hello[:n]) for n in (0, 3, len(hello) - 1)] == [False] * 3
    assert whole_message(hello)


def test_every_cut_hello_is_a_decode_error() -> None:
    hello = a_hello("h2")
    for end in range(1, len(hello)):
        with pytest.raises(TlsError) as caught:
            parse_client_hello(hello[:end])
        assert caught.value.code == Alert.DECODE_ERROR


def test_another_message_is_unexpected() -> None:
    with pytest.raises(TlsError) as caught:
        parse_client_hello(b"\x02\x00\x00\x00")
    assert caught.value.code == Alert.UNEXPECTED_MESSAGE


@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=8))
def test_a_damaged_hello_gives_an_offer_or_a_tls_error(at: int, junk: bytes) -> None:
    hello = bytearray(HELLO)
    at %= len(hello)
    hello[at : at + len(junk)] = junk
    offer = parsed(bytes(hello))
    assert isinstance(offer, ClientOffer) or offer in (
        Alert.DECODE_ERROR,
        Alert.UNEXPECTED_MESSAGE,
    )


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_tls_errors(data: bytes) -> None:
    assert parsed(data) is not None


HELLO = a_hello("h2")


def test_the_groups_of_an_offer_are_read() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_ecdh_curve("secp384r1")
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    assert parse_client_hello(outgoing.read()[5:]).groups == (24,)
