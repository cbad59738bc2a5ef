from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.certs import AUTHORITY, a_certificate, a_name, an_authority
from ztunnel.tls.certificate import WorkloadCertificate, istio_identities, parse_bundle


def test_identity_dates_and_serial_come_from_the_leaf() -> None:
    made = a_certificate(a_name("bank"), ttl_seconds=3600)
    assert made.identity == a_name("bank")
    assert 3600 <= made.not_after - made.not_before <= 3600 + 122
    assert made.serial > 0


def test_the_first_istio_name_counts() -> None:
    made = a_certificate(uris=["https://example.com", str(a_name("one")), str(a_name("two"))])
    assert made.identity == a_name("one")
    assert made.trust_domains == ("cluster.local",)


def test_a_leaf_without_a_name_checks_no_trust_domain() -> None:
    made = a_certificate(uris=[])
    assert made.identity is None
    assert made.trust_domains == ()


def test_the_key_is_never_printed() -> None:
    made = a_certificate()
    assert "PRIVATE" not in repr(made)
    assert "PRIVATE" in made.key_pem.decode()


def test_a_certificate_expires_at_its_last_second() -> None:
    made = a_certificate()
    assert made.expires(made.not_after - 10) == 10
    assert not made.has_expired(made.not_after - 1)
    assert made.has_expired(made.not_after)


def test_certificates_are_equal_only_to_themselves() -> None:
    made = a_certificate()
    again = WorkloadCertificate.load(
        chain_pem=made.chain_pem, key_pem=made.key_pem, roots_pem=made.roots_pem
    )
    assert made != again
    assert len({made, again}) == 2


def test_unreadable_roots_are_skipped_and_counted() -> None:
    broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    bundle = AUTHORITY.roots_pem + broken + b"a comment\n" + an_authority().roots_pem
    roots, skipped = parse_bundle(bundle)
    assert (len(roots), skipped) == (2, 1)


@given(chain=st.binary(max_size=200))
def test_a_chain_that_is_none_is_a_value_error(chain: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # cryptography's own texts
        WorkloadCertificate.load(chain_pem=chain, key_pem=b"", roots_pem=b"")


@given(st.lists(st.text()))
def test_any_names_give_only_well_formed_identities(names: list[str]) -> None:
    assert all(str(found) in names for found in istio_identities(tuple(names)))
