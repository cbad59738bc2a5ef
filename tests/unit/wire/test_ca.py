from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import IdentityError
from ztunnel.wire.ca import (
    CertificateRequest,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)


@pytest.mark.parametrize("impersonated", ["", "spiffe://td/ns/shop/sa/cart"])
def test_a_request_comes_back_as_it_was(impersonated: str) -> None:
    request = CertificateRequest(b"-----BEGIN", 86400, impersonated)
    assert decode_request(encode_request(request)) == request


def test_bytes_as_the_tables_say() -> None:
    # IstioCertificateRequest{1: "csr", 3: 60}; without impersonation no metadata.
    assert encode_request(CertificateRequest(b"csr", 60)) == b"\x0a\x03csr\x18\x3c"


def test_the_last_element_is_the_root_and_the_rest_the_chain() -> None:
    answer = encode_response([b"leaf\n", b"between\n", b"root one\nroot two\n"])
    assert decode_response(answer) == (b"leaf\nbetween\n", b"root one\nroot two\n")


@pytest.mark.parametrize("chain", [[], [b"leaf\n"]])
def test_an_answer_without_a_root_is_refused(chain: list[bytes]) -> None:
    with pytest.raises(IdentityError, match="no root"):
        decode_response(encode_response(chain))


@given(data=st.binary(max_size=100))
def test_garbage_raises_the_declared_error_only(data: bytes) -> None:
    for decode in (decode_request, decode_response):
        try:
            decode(data)
        except IdentityError:
            continue
