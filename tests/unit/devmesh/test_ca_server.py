from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tests.support.ca import a_running_ca
from tests.support.certs import (
    AUTHORITY,
    a_certificate,
    a_client_context,
    a_name,
    a_server_context,
    an_authority,
    an_established_pair,
)
from ztunnel.devmesh.ca_server import CaFault, MeshCa, serving_ca
from ztunnel.errors import CallError, IdentityError
from ztunnel.model.settings import Source, SourceKind
from ztunnel.tls.csr import make_signing_request
from ztunnel.wire.ca import CREATE_CERTIFICATE_PATH, CertificateRequest, encode_request

SAYS = {
    CaFault.DOWN: "signing gRPC error (UNAVAILABLE): the CA is down",
    CaFault.REFUSES: "(UNAUTHENTICATED): request impersonation authentication failure",
    CaFault.SLOW: "signing gRPC error (DEADLINE_EXCEEDED)",
    CaFault.WRONG_NAME: f"did not find expected SAN: {a_name()}",
    CaFault.WRONG_KEY: "another key",
    CaFault.NO_ROOT: "no root",
    CaFault.GARBAGE: "unreadable certificate",
}


async def test_it_signs_with_its_intermediates() -> None:
    async with a_running_ca(AUTHORITY.subordinate()) as running:
        made = await running.client().issue(a_name("bank"))
    assert made.identity == a_name("bank")
    assert made.chain_pem.count(b"BEGIN") == 2
    assert made.roots_pem == AUTHORITY.roots_pem
    an_established_pair(a_client_context(made), a_server_context(a_certificate(a_name("server"))))


async def test_a_life_is_as_short_as_the_shorter_wish() -> None:
    async with a_running_ca(ttl_seconds_max=30) as running:
        capped = await running.client(ttl_seconds=3600).issue(a_name())
        asked = await running.client(ttl_seconds=5).issue(a_name())
    assert 20 < capped.not_after - capped.not_before - 120 <= 32
    assert 4 <= asked.not_after - asked.not_before - 120 <= 7


@pytest.mark.parametrize("fault", SAYS)
async def test_each_fault_is_a_different_error(fault: CaFault) -> None:
    async with a_running_ca() as running:
        client = running.client(call_seconds=0.3 if fault is CaFault.SLOW else 5)
        running.ca.fault = fault
        with pytest.raises(IdentityError) as caught:
            await client.issue(a_name())
        assert SAYS[fault] in str(caught.value)
        assert str(caught.value).endswith(f"(CA https://localhost:{running.port})")
        running.ca.fault = CaFault.NONE
        client = running.client()
        assert (await client.issue(a_name())).identity == a_name()


async def test_an_expired_certificate_is_sent_as_if_it_were_good() -> None:
    async with a_running_ca() as running:
        running.ca.fault = CaFault.EXPIRED
        made = await running.client().issue(a_name())
    assert made.has_expired(AUTHORITY.clock())


async def test_whoever_shows_another_token_is_turned_away() -> None:
    async with a_running_ca(token="secret") as running:
        wrong = Source(SourceKind.LITERAL, "guess")
        with pytest.raises(IdentityError, match="UNAUTHENTICATED"):
            await running.client(token=wrong).issue(a_name())
        await running.client(token=Source(SourceKind.LITERAL, "secret")).issue(a_name())
        assert [call.token for call in running.ca.calls] == ["guess", "secret"]


async def test_nobody_is_signed_in_the_name_of_another() -> None:
    async with a_running_ca() as running:
        csr = make_signing_request(a_name("mallory")).csr_pem
        wire = encode_request(CertificateRequest(csr, 60, str(a_name("bank"))))
        with pytest.raises(CallError, match=r"for spiffe://cluster\.local/ns/shop/sa/bank"):
            await running.client().caller.unary(CREATE_CERTIFICATE_PATH, wire, seconds=5)


async def test_what_is_no_request_is_refused() -> None:
    async with a_running_ca() as running:
        for wire in (b"\xff", encode_request(CertificateRequest(b"no csr", 60))):
            with pytest.raises(CallError, match="INVALID_ARGUMENT"):
                await running.client().caller.unary(CREATE_CERTIFICATE_PATH, wire, seconds=5)


async def test_it_may_change_its_root_while_it_runs() -> None:
    other = AUTHORITY.create("other.example")
    async with a_running_ca() as running:
        client = running.client()
        running.ca.authority = other
        made = await client.issue(a_name())
    assert made.roots_pem == other.roots_pem


def test_a_server_certificate_names_hosts_and_addresses() -> None:
    with serving_ca(MeshCa(AUTHORITY), hosts=("ca.example", "127.0.0.1")) as port:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.roots_pem)
        for target, name in ((f"127.0.0.1:{port}", ""), (f"localhost:{port}", "ca.example")):
            options = [("grpc.ssl_target_name_override", name)] if name else []
            with grpc.secure_channel(target, credentials, options) as channel:
                grpc.channel_ready_future(channel).result(timeout=5)


def test_names_of_hosts_stand_beside_no_spiffe_name() -> None:
    key = AUTHORITY.key.public_key()
    leaf = AUTHORITY.certify(key, [], hosts=("ca.example", "::1"))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["ca.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["::1"]


async def test_token_and_root_are_read_anew_for_each_call(tmp_path: Path) -> None:
    root, token = tmp_path / "root.pem", tmp_path / "token"
    root.write_bytes(an_authority().roots_pem)
    token.write_text("old\n")
    async with a_running_ca(token="new") as running:
        sources = {
            "root": Source(SourceKind.FILE, str(root)),
            "token": Source(SourceKind.FILE, str(token)),
        }
        client = running.client(**sources)
        with pytest.raises(IdentityError, match="UNAVAILABLE"):
            await client.issue(a_name())
        root.write_bytes(AUTHORITY.roots_pem)
        with pytest.raises(IdentityError, match="UNAUTHENTICATED"):
            await client.issue(a_name())
        token.write_text("new\n")
        assert (await client.issue(a_name())).identity == a_name()
        assert [call.token for call in running.ca.calls] == ["old", "new"]
