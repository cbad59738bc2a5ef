"""Handshakes with revocation lists, and whatever chain of issuers a peer shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from tests.support.certs import (
    AUTHORITY,
    a_certificate,
    a_client_context,
    a_name,
    a_server_context,
    an_authority,
    an_established_pair,
    shake_hands,
    talk_both_ways,
)
from ztunnel.errors import RevokedError, TlsError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.tls.crl import Revocations, parse_lists
from ztunnel.tls.handshake import Handshake

OTHERS = an_authority()
OUT = memoryview(bytearray(1 << 18))


def enforced(*pems: bytes) -> Revocations:
    revocations = Revocations()
    revocations.replace(parse_lists(b"".join(pems)))
    return revocations


@pytest.mark.parametrize("own_records", [True, False])
@pytest.mark.parametrize("authority", [AUTHORITY, AUTHORITY.subordinate()], ids=["root", "below"])
def test_a_peer_that_is_not_revoked_brings_the_links_of_its_chain(
    authority: DevelopmentCa,
    own_records: bool,
) -> None:
    made = a_certificate(a_name("client"), authority=authority)
    one, other = an_established_pair(
        a_client_context(made, own_records=own_records),
        a_server_context(own_records=own_records, revocations=enforced(authority.revoke(1))),
    )
    assert other.peer.links[0].serial == made.serial
    assert len(other.peer.links) == 1 + len(authority.intermediates)
    assert one.peer.links == (), "without lists there is nothing to know"
    talk_both_ways(one, other)


def test_a_revoked_client_is_refused_and_told_so() -> None:
    made = a_certificate(a_name("client"))
    client = Handshake(a_client_context(made), server_side=False)
    lists = enforced(AUTHORITY.revoke(made.serial))
    server = Handshake(a_server_context(revocations=lists), server_side=True)
    shake_hands(client, server)
    with pytest.raises(RevokedError) as caught:
        server.finish()
    assert str(caught.value) == (
        f"tls handshake error: peer certificate revoked by CRL (serial {made.serial:x})"
    )
    with pytest.raises(TlsError, match=r"peer sent alert: certificate revoked \(44\)"):
        client.finish().records.open(memoryview(caught.value.alert), OUT)


def test_a_server_below_a_revoked_authority_is_refused() -> None:
    below = AUTHORITY.subordinate()
    lists = enforced(AUTHORITY.revoke(below.signer.serial_number))
    client = Handshake(a_client_context(revocations=lists), server_side=False)
    made = a_certificate(a_name("server"), authority=below)
    shake_hands(client, Handshake(a_server_context(made), server_side=True))
    with pytest.raises(RevokedError, match="revoked by CRL"):
        client.finish()


UPPER = AUTHORITY.subordinate("upper")
LOWER = UPPER.subordinate("lower")
ISSUED = a_certificate(a_name("client"), authority=LOWER)
LEAF_PEM, *UP_PEM = (
    block + b"-----END CERTIFICATE-----\n"
    for block in ISSUED.chain_pem.split(b"-----END CERTIFICATE-----\n")
    if block.strip()
)
STRANGERS = [one.chain_pem for one in (a_certificate(), a_certificate(authority=OTHERS))]
SUBJECTS = [*UP_PEM, *STRANGERS, AUTHORITY.roots_pem, OTHERS.roots_pem]


@settings(max_examples=60)
@given(chain=st.lists(st.sampled_from(SUBJECTS), max_size=6))
def test_whatever_chain_a_client_shows_it_is_itself_or_refused(chain: list[bytes]) -> None:
    shown = replace(ISSUED, chain_pem=LEAF_PEM + b"".join(chain))
    one = Handshake(a_client_context(shown), server_side=False)
    other = Handshake(a_server_context(revocations=enforced(OTHERS.revoke())), server_side=True)
    try:
        shake_hands(one, other)
        peer = other.finish().peer
    except TlsError as error:
        assert not set(UP_PEM) <= set(chain)
        assert str(error).startswith("tls handshake error: certificate verify")  # noqa: PT017
    else:
        assert peer.identities == (a_name("client"),)
        assert [link.serial for link in peer.links][1:] == [
            LOWER.signer.serial_number,
            UPPER.signer.serial_number,
        ]
