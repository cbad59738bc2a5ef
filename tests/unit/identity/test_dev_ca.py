from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, strategies as st

from tests.support.certs import (
    a_client_context,
    a_name,
    a_server_context,
    an_authority,
    an_established_pair,
)
from ztunnel.errors import IdentityError
from ztunnel.identity.dev_ca import DevelopmentCa, DevelopmentIssuer, Usage
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.csr import make_signing_request, private_pem

AUTHORITY = an_authority()


def test_a_leaf_has_the_shape_of_an_x509_svid() -> None:
    made = AUTHORITY.issue(a_name("bank"))
    leaf = x509.load_pem_x509_certificate(made.chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert len(list(leaf.subject)) == 0
    assert names.critical
    assert [name.value for name in names.value] == [str(a_name("bank"))]
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    leaf.verify_directly_issued_by(AUTHORITY.root)
    assert made.roots_pem == AUTHORITY.roots_pem
    assert made.identity == a_name("bank")


def test_a_leaf_is_backdated_and_lives_as_long_as_asked() -> None:
    authority = DevelopmentCa.create(clock=lambda: 1_800_000_000.0)
    made = authority.issue(a_name(), ttl_seconds=60)
    assert made.not_before == 1_800_000_000 - 120
    assert made.not_after == 1_800_000_060
    assert authority.issue(a_name()).not_after == 1_800_000_000 + 86400


def test_a_leaf_may_be_for_one_role_only() -> None:
    made = AUTHORITY.issue(a_name(), usage=Usage.CLIENT)
    leaf = x509.load_pem_x509_certificate(made.chain_pem)
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_child_process_issues_under_the_same_root() -> None:
    child = DevelopmentCa.from_pem(AUTHORITY.to_pem())
    an_established_pair(
        a_client_context(child.issue(a_name("client"))),
        a_server_context(AUTHORITY.issue(a_name("server"))),
    )
    assert child.trust_domain == "cluster.local"


def test_the_key_is_never_printed() -> None:
    assert "key" not in repr(AUTHORITY)


@pytest.mark.parametrize(
    "pem",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(AUTHORITY.roots_pem, id="no key"),
        pytest.param(private_pem(AUTHORITY.key), id="no root"),
        pytest.param(AUTHORITY.roots_pem + private_pem(an_authority().key), id="another's key"),
    ],
)
def test_a_root_that_is_incomplete_is_refused(pem: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # some texts are cryptography's own
        DevelopmentCa.from_pem(pem)


def test_a_signing_request_is_answered_with_leaf_and_root() -> None:
    request = make_signing_request(a_name("bank"))
    leaf, root = AUTHORITY.sign(request.csr_pem, ttl_seconds=600)
    made = WorkloadCertificate.load(chain_pem=leaf, key_pem=request.key_pem, roots_pem=root)
    assert made.identity == a_name("bank")
    assert root == AUTHORITY.roots_pem
    an_established_pair(a_client_context(made), a_server_context(AUTHORITY.issue(a_name())))


def a_request(*uris: str, key: CertificateIssuerPrivateKeyTypes | None = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(u) for u in uris])
        builder = builder.add_extension(names, critical=True)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.com"],
        [str(a_name("one")), str(a_name("two"))],
        [str(a_name("one")), "https://example.com"],
    ],
)
def test_a_request_for_anything_but_one_identity_is_refused(uris: list[str]) -> None:
    with pytest.raises(IdentityError):
        AUTHORITY.sign(a_request(*uris))


def test_a_request_that_was_tampered_with_is_refused() -> None:
    request = x509.load_pem_x509_csr(a_request(str(a_name("aaaa"))))
    der = request.public_bytes(Encoding.DER).replace(b"sa/aaaa", b"sa/root")
    forged = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError, match="signature"):
        AUTHORITY.sign(forged)


@given(st.binary(max_size=200))
def test_arbitrary_requests_raise_only_identity_errors(csr: bytes) -> None:
    with pytest.raises(IdentityError):
        AUTHORITY.sign(csr)


def test_an_identity_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(IdentityError, match="invalid spiffe identity"):
        AUTHORITY.issue(a_name("b\u00e4nk"))


async def test_the_issuer_gives_certificates_of_its_authority() -> None:
    made = await DevelopmentIssuer(AUTHORITY, ttl_seconds=60).issue(a_name("bank"))
    assert made.identity == a_name("bank")
    assert made.roots_pem == AUTHORITY.roots_pem


def test_nothing_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DevelopmentCa.from_pem(DevelopmentCa.create("example.org").to_pem()).issue(a_name())
    assert list(tmp_path.iterdir()) == []


def test_an_authority_below_signs_with_its_own_key_and_leads_up_to_the_root() -> None:
    below = AUTHORITY.subordinate("upper").subordinate("lower")
    made = below.issue(a_name("client"))
    chain = x509.load_pem_x509_certificates(made.chain_pem)
    assert len(chain) == 3
    for one, above in zip(chain, [*chain[1:], AUTHORITY.root], strict=True):
        one.verify_directly_issued_by(above)
    assert made.roots_pem == AUTHORITY.roots_pem
    an_established_pair(a_client_context(made), a_server_context(AUTHORITY.issue(a_name())))


def test_a_signing_request_is_answered_with_the_intermediates_in_between() -> None:
    below = AUTHORITY.subordinate()
    leaf, intermediate, root = below.sign(make_signing_request(a_name()).csr_pem)
    assert intermediate == below.signer.public_bytes(Encoding.PEM)
    assert root == AUTHORITY.roots_pem
    x509.load_pem_x509_certificate(leaf).verify_directly_issued_by(below.signer)


def test_other_roots_stand_in_the_bundle() -> None:
    other = DevelopmentCa.create()
    both = replace(AUTHORITY, other_roots=(other.root,))
    assert x509.load_pem_x509_certificates(both.roots_pem) == [AUTHORITY.root, other.root]


@pytest.mark.parametrize("authority", [AUTHORITY, AUTHORITY.subordinate()], ids=["root", "below"])
def test_what_is_taken_back_is_listed_and_signed(authority: DevelopmentCa) -> None:
    content = x509.load_pem_x509_crl(authority.revoke(5, 6))
    assert [entry.serial_number for entry in content] == [5, 6]
    assert content.issuer == authority.signer.subject
    assert content.is_signature_valid(authority.key.public_key())
    assert len(list(x509.load_pem_x509_crl(authority.revoke()))) == 0


def test_a_list_may_be_out_of_date() -> None:
    authority = DevelopmentCa.create(clock=lambda: 1_800_000_000.0)
    content = x509.load_pem_x509_crl(authority.revoke(5, lifetime_seconds=-60))
    assert content.next_update_utc is not None
    assert content.next_update_utc.timestamp() == 1_800_000_000 - 60
    assert content.last_update_utc < content.next_update_utc
