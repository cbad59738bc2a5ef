from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, strategies as st

from tests.support.certs import AUTHORITY, a_certificate, an_authority
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.tls.certificate import WorkloadCertificate, parse_bundle
from ztunnel.tls.crl import FILE_BYTES_MAX, Link, RevocationList, Revocations, parse_lists

BELOW = AUTHORITY.subordinate()


def chain_of(certificate: WorkloadCertificate) -> list[bytes]:
    """Give what OpenSSL would call the verified chain."""
    (root,) = parse_bundle(certificate.roots_pem)[0]
    return [*parse_bundle(certificate.chain_pem)[0], root]


def links_of(certificate: WorkloadCertificate) -> tuple[Link, ...]:
    return Revocations().links(chain_of(certificate))


def in_force(*pems: bytes) -> Revocations:
    revocations = Revocations()
    revocations.replace(parse_lists(b"".join(pems)))
    return revocations


def a_list(
    authority: DevelopmentCa = AUTHORITY,
    *,
    serials: Collection[int] = (),
    extension: x509.ExtensionType | None = None,
) -> RevocationList:
    """Make a list that `DevelopmentCa.revoke` would not."""
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(authority.signer.subject, now, now)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder(serial, now)
        builder = builder.add_revoked_certificate(entry.build())
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return RevocationList.read(builder.sign(authority.key, SHA256()))


def a_scope(**fields: bool) -> x509.IssuingDistributionPoint:
    names = (
        "only_contains_user_certs",
        "only_contains_ca_certs",
        "indirect_crl",
        "only_contains_attribute_certs",
    )
    return x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_some_reasons=None
        if any(fields.values())
        else frozenset({x509.ReasonFlags.superseded}),
        **{name: fields.get(name, False) for name in names},
    )


def test_a_chain_has_a_link_for_each_certificate_below_the_anchor() -> None:
    made = a_certificate(authority=BELOW)
    leaf, intermediate = links_of(made)
    assert (leaf.serial, leaf.is_leaf) == (made.serial, True)
    assert (intermediate.serial, intermediate.is_leaf) == (BELOW.signer.serial_number, False)
    assert leaf.issuer.name == BELOW.signer.subject.public_bytes()
    assert intermediate.issuer.name == AUTHORITY.root.subject.public_bytes()


def test_tunnels_of_one_authority_share_its_issuer() -> None:
    revocations = Revocations()
    one, other = (revocations.links(chain_of(a_certificate())) for _ in range(2))
    assert one[0].issuer is other[0].issuer


def test_a_leaf_that_is_its_own_anchor_cannot_be_indexed() -> None:
    assert Revocations().links(chain_of(a_certificate())[:1]) == ()


def test_only_what_is_listed_is_revoked() -> None:
    revoked, fine = a_certificate(), a_certificate()
    revocations = in_force(AUTHORITY.revoke(revoked.serial, 1, 2))
    assert revocations.revoked(links_of(revoked)) == links_of(revoked)[0]
    assert revocations.revoked(links_of(fine)) is None


def test_another_process_can_have_the_lists_in_force() -> None:
    revoked, fine = a_certificate(), a_certificate()
    first = in_force(AUTHORITY.revoke(revoked.serial, 1, 2))
    second = Revocations()
    second.replace([one for der in first.in_force() for one in parse_lists(der)])
    assert second.revoked(links_of(revoked)) == links_of(revoked)[0]
    assert second.revoked(links_of(fine)) is None


def test_before_anything_is_loaded_nothing_is_revoked() -> None:
    assert Revocations().revoked(links_of(a_certificate())) is None


def test_with_an_intermediate_all_below_it_falls() -> None:
    revocations = in_force(AUTHORITY.revoke(BELOW.signer.serial_number))
    found = revocations.revoked(links_of(a_certificate(authority=BELOW)))
    assert found is not None
    assert not found.is_leaf
    assert revocations.revoked(links_of(a_certificate())) is None


def test_each_authority_takes_back_only_its_own() -> None:
    made = a_certificate(authority=BELOW)
    assert in_force(AUTHORITY.revoke(made.serial)).revoked(links_of(made)) is None
    assert in_force(BELOW.revoke(made.serial)).revoked(links_of(made)) is not None


def test_an_authority_of_the_same_name_but_another_key_has_no_say() -> None:
    namesake, made = an_authority(), a_certificate()
    assert namesake.root.subject == AUTHORITY.root.subject
    assert in_force(namesake.revoke(made.serial)).revoked(links_of(made)) is None
    both = in_force(namesake.revoke(made.serial), AUTHORITY.revoke(made.serial))
    assert both.revoked(links_of(made)) is not None


def test_a_forged_list_has_no_say() -> None:
    made = a_certificate()
    pem = AUTHORITY.revoke(made.serial)
    der = bytearray(x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER))
    der[-1] ^= 1
    assert in_force(bytes(der)).revoked(links_of(made)) is None
    assert in_force(pem).revoked(links_of(made)) is not None


def test_an_expired_list_still_counts() -> None:
    made = a_certificate()
    (one,) = parse_lists(AUTHORITY.revoke(made.serial, lifetime_seconds=-60))
    assert one.next_update is not None
    assert one.next_update < datetime.now(UTC).timestamp()
    assert in_force(AUTHORITY.revoke(made.serial, lifetime_seconds=-60)).revoked(links_of(made))


def test_an_expired_certificate_is_not_revoked() -> None:
    assert in_force(AUTHORITY.revoke(1)).revoked(links_of(a_certificate(ttl_seconds=-60))) is None


def test_one_file_holds_any_number_of_lists_among_other_things() -> None:
    made = [a_certificate(), a_certificate(authority=BELOW)]
    pem = AUTHORITY.revoke(made[0].serial) + AUTHORITY.roots_pem + BELOW.revoke(made[1].serial)
    assert len(parse_lists(pem)) == 2
    assert all(in_force(pem).revoked(links_of(one)) for one in made)


def test_one_list_may_be_der() -> None:
    der = x509.load_pem_x509_crl(AUTHORITY.revoke(7)).public_bytes(Encoding.DER)
    assert parse_lists(der)[0].serials == {7}


@pytest.mark.parametrize(
    "data", [b"", b" \n", AUTHORITY.roots_pem], ids=["empty", "space", "no list"]
)
def test_without_a_list_there_are_no_revocations(data: bytes) -> None:
    assert parse_lists(data) == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"what is this", id="nonsense"),
        pytest.param(AUTHORITY.revoke(1)[:-30], id="cut off"),
        pytest.param(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", id="empty block"),
        pytest.param(bytes(FILE_BYTES_MAX + 1), id="too long"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"revocation list|longer than"):
        parse_lists(data)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_files_raise_only_value_errors(data: bytes, as_pem: bool) -> None:
    if as_pem:
        data = b"-----BEGIN X509 CRL-----\n" + data + b"\n-----END X509 CRL-----\n"
    with suppress(ValueError):
        assert parse_lists(data) == []


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=4))
def test_a_damaged_list_revokes_nothing(at: int, junk: bytes) -> None:
    damaged = bytearray(DER)
    at %= len(damaged)
    damaged[at : at + len(junk)] = junk
    try:
        lists = parse_lists(bytes(damaged))
    except ValueError:
        return
    revocations = Revocations()
    revocations.replace(lists)
    assert bytes(damaged) == DER or revocations.revoked(LINKS) is None


VICTIM = a_certificate()
LINKS = links_of(VICTIM)
CHAIN = chain_of(VICTIM)
DER = x509.load_pem_x509_crl(AUTHORITY.revoke(VICTIM.serial)).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("scope", "leaf", "authority"),
    [
        (a_scope(), True, True),
        (a_scope(only_contains_user_certs=True), True, False),
        (a_scope(only_contains_ca_certs=True), False, True),
        (a_scope(only_contains_attribute_certs=True), False, False),
    ],
    ids=["some reasons", "leaves", "authorities", "attributes"],
)
def test_the_scope_of_a_list_is_kept(
    scope: x509.IssuingDistributionPoint,
    leaf: bool,
    authority: bool,
) -> None:
    made = a_certificate(authority=BELOW)
    links = links_of(made)
    revocations = Revocations()
    revocations.replace([a_list(BELOW, serials=[made.serial], extension=scope)])
    assert (revocations.revoked(links) is not None) is leaf
    serial = BELOW.signer.serial_number
    revocations.replace([a_list(AUTHORITY, serials=[serial], extension=scope)])
    assert (revocations.revoked(links) is not None) is authority


@pytest.mark.parametrize(
    "extension",
    [
        a_scope(indirect_crl=True),
        x509.DeltaCRLIndicator(1),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),
    ],
    ids=["indirect", "delta", "unknown"],
)
def test_a_list_of_a_kind_that_we_would_misread_is_refused(extension: x509.ExtensionType) -> None:
    with pytest.raises(ValueError, match="list"):
        a_list(extension=extension)


def test_lists_are_replaced_as_a_whole_and_those_who_asked_are_told() -> None:
    revocations, told = Revocations(), []
    stop = revocations.subscribe(lambda: told.append(revocations.generation))
    revocations.replace(parse_lists(AUTHORITY.revoke(VICTIM.serial)))
    assert revocations.revoked(LINKS) is not None
    revocations.replace([])
    assert revocations.revoked(LINKS) is None
    stop()
    revocations.replace([])
    assert told == [1, 2]
    assert revocations.generation == 3


def test_an_issuer_whose_key_cannot_be_read_revokes_nothing() -> None:
    (one,) = parse_lists(AUTHORITY.revoke(1))
    assert one.is_signed_by(LINKS[0].issuer)
    assert not one.is_signed_by(replace(LINKS[0].issuer, key=b"no key"))


def test_a_chain_that_cannot_be_read_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unreadable certificate"):
        Revocations().links([b"nonsense", b"nonsense"])


@given(chain=st.lists(st.binary(max_size=60) | st.just(CHAIN[0]) | st.just(CHAIN[1]), max_size=5))
def test_arbitrary_chains_raise_only_value_errors(chain: list[bytes]) -> None:
    try:
        links = Revocations().links(chain)
    except ValueError:
        return
    assert len(links) == max(0, len(chain) - 1)
    assert [link.is_leaf for link in links] == [True, False, False, False, False][: len(links)]
