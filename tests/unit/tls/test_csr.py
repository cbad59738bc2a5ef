from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.support.certs import a_name
from ztunnel.errors import IdentityError
from ztunnel.tls.csr import make_signing_request


def test_a_request_asks_for_one_critical_name_and_nothing_else() -> None:
    made = make_signing_request(a_name("bank"))
    request = x509.load_pem_x509_csr(made.csr_pem)
    (extension,) = list(request.extensions)
    assert isinstance(extension.value, x509.SubjectAlternativeName)
    assert extension.critical
    assert [name.value for name in extension.value] == [str(a_name("bank"))]
    assert len(list(request.subject)) == 0
    assert isinstance(request.signature_hash_algorithm, SHA256)
    assert request.is_signature_valid


def test_the_key_is_a_fresh_p256_key_in_pkcs8() -> None:
    one, other = (make_signing_request(a_name()) for _ in range(2))
    key = load_pem_private_key(one.key_pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert one.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert one.key_pem != other.key_pem
    assert x509.load_pem_x509_csr(one.csr_pem).public_key() == key.public_key()


def test_the_key_is_never_printed() -> None:
    assert "PRIVATE" not in repr(make_signing_request(a_name()))


def test_an_identity_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(IdentityError, match="failed to create CSR"):
        make_signing_request(a_name("b\u00e4nk"))
