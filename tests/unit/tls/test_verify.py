from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, strategies as st

from tests.support.certs import a_certificate, a_name
from ztunnel.errors import PeerIdentityError, TlsError
from ztunnel.model.identity import Identity, TrustDomain
from ztunnel.tls.alerts import Alert
from ztunnel.tls.verify import PeerCertificate, verify_client, verify_server

OURS = TrustDomain("cluster.local")
FOREIGN = a_name("mallory", trust_domain="evil.local")


def a_leaf(*uris: object) -> bytes:
    made = a_certificate(uris=[str(uri) for uri in uris])
    return x509.load_pem_x509_certificate(made.chain_pem).public_bytes(Encoding.DER)


def a_peer(*uris: object) -> PeerCertificate:
    return PeerCertificate.parse(a_leaf(*uris))


def test_names_dates_and_serial_are_read_once() -> None:
    made = a_certificate(a_name("bank"))
    leaf = x509.load_pem_x509_certificate(made.chain_pem)
    peer = PeerCertificate.parse(leaf.public_bytes(Encoding.DER))
    assert peer.identities == (a_name("bank"),)
    assert peer.uri_sans == (str(a_name("bank")),)
    assert (peer.not_after, peer.serial) == (made.not_after, made.serial)


def test_names_that_are_not_istios_are_skipped() -> None:
    peer = a_peer("https://example.com", "spiffe://cluster.local/other", a_name("bank"))
    assert peer.identities == (a_name("bank"),)
    assert len(peer.uri_sans) == 3


def test_a_server_is_accepted_by_any_of_its_names() -> None:
    peer = a_peer(a_name("one"), a_name("two"))
    assert verify_server(peer, (a_name("two"), a_name("three"))) == a_name("two")


@pytest.mark.parametrize(
    ("shown", "expected", "text"),
    [
        pytest.param(
            [a_name("b")],
            [a_name("a")],
            "(spiffe://cluster.local/ns/shop/sa/a), got spiffe://cluster.local/ns/shop/sa/b",
            id="another account",
        ),
        pytest.param(
            [a_name("a", trust_domain="evil.local")],
            [a_name("a")],
            "(spiffe://cluster.local/ns/shop/sa/a), got spiffe://evil.local/ns/shop/sa/a",
            id="another trust domain",
        ),
        pytest.param([], [a_name("a")], "(spiffe://cluster.local/ns/shop/sa/a), got ", id="none"),
        pytest.param(
            [a_name("a"), a_name("b")],
            [],
            "(), got spiffe://cluster.local/ns/shop/sa/a,spiffe://cluster.local/ns/shop/sa/b",
            id="nothing expected",
        ),
    ],
)
def test_a_server_that_we_do_not_expect_is_refused(
    shown: list[Identity], expected: list[Identity], text: str
) -> None:
    with pytest.raises(PeerIdentityError) as caught:
        verify_server(a_peer(*shown), expected)
    assert str(caught.value) == (
        f"identity verification error: peer did not present the expected SAN {text}"
    )
    assert caught.value.code == Alert.BAD_CERTIFICATE


def test_a_client_of_our_trust_domain_is_accepted() -> None:
    assert verify_client(a_peer(a_name("bank")), [OURS]) == a_name("bank")


def test_the_name_that_was_checked_is_the_name_that_counts() -> None:
    assert verify_client(a_peer(FOREIGN, a_name("bank")), [OURS]) == a_name("bank")


@pytest.mark.parametrize("shown", [[], [FOREIGN], ["spiffe://cluster.local/other"]])
def test_a_client_without_a_name_in_our_trust_domain_is_refused(shown: list[object]) -> None:
    got = "spiffe://evil.local/ns/shop/sa/mallory" if shown == [FOREIGN] else ""
    with pytest.raises(PeerIdentityError) as caught:
        verify_client(a_peer(*shown), [OURS])
    assert str(caught.value) == (
        "identity verification error: peer did not present the expected trustdomain"
        f" (cluster.local), got {got}"
    )


def test_without_a_trust_domain_of_our_own_there_is_no_check() -> None:
    assert verify_client(a_peer(FOREIGN), ()) == FOREIGN
    assert verify_client(a_peer(), ()) is None


def test_error_texts_have_an_end() -> None:
    peer = a_peer(*(a_name("x" * 400 + str(n)) for n in range(50)))
    with pytest.raises(PeerIdentityError, match="and 42 more") as caught:
        verify_server(peer, [a_name("a")])
    assert len(str(caught.value)) < 3000


uris = st.lists(st.text(st.characters(codec="ascii"), max_size=40), max_size=5)


@given(uris=uris)
def test_hostile_names_never_pass_for_one_of_ours(uris: list[str]) -> None:
    peer = a_peer(*uris)
    if str(a_name()) not in uris:
        with pytest.raises(PeerIdentityError):
            verify_server(peer, [a_name()])
    assert all(str(identity) in uris for identity in peer.identities)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=4))
def test_a_damaged_leaf_is_a_tls_error_or_a_certificate(at: int, junk: bytes) -> None:
    damaged = bytearray(LEAF)
    at %= len(damaged)
    damaged[at : at + len(junk)] = junk
    try:
        peer = PeerCertificate.parse(bytes(damaged))
    except TlsError as error:
        assert str(error).startswith("unreadable peer certificate")  # noqa: PT017
    else:
        assert peer.serial == x509.load_der_x509_certificate(bytes(damaged)).serial_number


LEAF = a_leaf(a_name())
