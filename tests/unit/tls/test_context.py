from __future__ import annotations

import os
import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.certs import AUTHORITY, a_certificate, a_name, an_authority, an_established_pair
from ztunnel.config import Config
from ztunnel.errors import TlsError
from ztunnel.tls import context as module
from ztunnel.tls.context import TlsContexts, issuer_of_a_lone_leaf


def test_a_context_is_made_once_per_certificate_and_role() -> None:
    contexts, certificate = TlsContexts(), a_certificate()
    assert contexts.server(certificate) is contexts.server(certificate)
    assert contexts.client(certificate) is contexts.client(certificate)
    assert contexts.server(certificate) is not contexts.client(certificate)


def test_the_demand_for_post_quantum_groups_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    demanded: list[str] = []
    monkeypatch.setattr(module, "restrict_groups", lambda group, why: demanded.append(group + why))
    monkeypatch.setattr(module, "prefer_usual_groups", lambda: demanded.append("usual"))
    for wanted in (False, True):
        TlsContexts.of(Config(post_quantum_only=wanted), None)
    assert demanded == ["usual", "X25519MLKEM768COMPLIANCE_POLICY=pqc"]


def test_a_renewed_certificate_takes_the_place_of_the_old_one() -> None:
    contexts = TlsContexts()
    old, new = a_certificate(a_name("bank")), a_certificate(a_name("bank"))
    first = contexts.server(old)
    assert contexts.server(new) is not first
    assert contexts.server(new) is contexts.server(new)
    assert contexts.server(old) is not first


def test_identities_do_not_share_a_context() -> None:
    contexts = TlsContexts()
    one, other = a_certificate(a_name("one")), a_certificate(a_name("other"))
    assert contexts.client(one).certificate is one
    assert contexts.client(other).certificate is other
    assert contexts.client(one) is contexts.client(one)


def test_forgotten_identities_and_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTEXTS_MAX", 2)
    contexts = TlsContexts()
    certificates = [a_certificate(a_name(str(n))) for n in range(3)]
    made = [contexts.client(certificate) for certificate in certificates]
    assert contexts.client(certificates[2]) is made[2]
    assert contexts.client(certificates[0]) is not made[0]
    contexts.forget(a_name("2"))
    assert contexts.client(certificates[2]) is not made[2]


@pytest.mark.parametrize("server_side", [False, True])
def test_the_settings_are_those_of_the_reference(server_side: bool) -> None:
    contexts, certificate = TlsContexts(), a_certificate()
    context = contexts.server(certificate) if server_side else contexts.client(certificate)
    settings = context.ssl_context
    assert settings.minimum_version is ssl.TLSVersion.TLSv1_3
    assert settings.verify_mode is ssl.CERT_REQUIRED
    assert not settings.check_hostname
    if server_side:
        assert settings.num_tickets == 0


def test_tls_12_is_for_those_who_ask_and_has_only_aes_gcm() -> None:
    settings = TlsContexts(tls12_enabled=True).server(a_certificate()).ssl_context
    assert settings.minimum_version is ssl.TLSVersion.TLSv1_2
    old = [c["name"] for c in settings.get_ciphers() if c["protocol"] == "TLSv1.2"]
    assert old
    assert all("ECDHE" in name and "AES" in name and "GCM" in name for name in old)


def test_unreadable_roots_beside_good_ones_do_no_harm() -> None:
    broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    roots = broken + an_authority().roots_pem + AUTHORITY.roots_pem + AUTHORITY.roots_pem
    contexts = TlsContexts()
    client, _ = an_established_pair(
        contexts.client(a_certificate(roots_pem=roots)), contexts.server(a_certificate())
    )
    assert client.version == "TLSv1.3"


@pytest.mark.parametrize(
    "field",
    [
        pytest.param({"roots_pem": b""}, id="no roots"),
        pytest.param({"key_pem": b""}, id="no key"),
        pytest.param({"key_pem": a_certificate().key_pem}, id="the key of another"),
        pytest.param({"chain_pem": b"nonsense"}, id="no chain"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_a_tls_error(field: dict[str, bytes]) -> None:
    before = open_descriptors()
    with pytest.raises(TlsError, match=r"^tls error: "):
        TlsContexts().server(replace(a_certificate(), **field))
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_contexts_do_not_leak_descriptors() -> None:
    certificate = a_certificate()
    before = open_descriptors()
    for _ in range(5):
        TlsContexts().server(certificate)
    assert open_descriptors() == before


def test_keys_never_touch_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    TlsContexts().server(a_certificate())
    assert list(tmp_path.iterdir()) == []


def test_a_lone_leaf_gets_the_root_that_signed_it_and_a_longer_chain_none() -> None:
    """OpenSSL sends it anyway, but if it must look for it, it verifies our leaf each time."""
    namesake = an_authority()  # of the same name, with another key
    roots = [one.root.public_bytes(Encoding.DER) for one in (namesake, AUTHORITY)]
    stranger = an_authority("example.org").root.public_bytes(Encoding.DER)
    leaf, longer = a_certificate(), a_certificate(authority=AUTHORITY.subordinate())
    assert issuer_of_a_lone_leaf(leaf.chain_pem, roots).strip() == AUTHORITY.roots_pem.strip()
    assert issuer_of_a_lone_leaf(leaf.chain_pem, [stranger]) == b""
    assert issuer_of_a_lone_leaf(longer.chain_pem, roots) == b""
