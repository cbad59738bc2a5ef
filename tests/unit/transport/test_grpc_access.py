"""Where the control plane is and whom to trust there; real connections are in test_grpc.py."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from ztunnel.config import Config
from ztunnel.errors import CallError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport import grpc_access as module
from ztunnel.transport.grpc_access import GrpcAccess

AUTHORITY = DevelopmentCa.create()
ROOTS = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())


def test_the_roots_of_the_system_are_those_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(AUTHORITY.roots_pem)
    nowhere = ssl.get_default_verify_paths()._replace(cafile=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setattr(module, "SYSTEM_BUNDLES", ("/nonexistent/bundle", str(bundle)))
    server = ServerUrl("xds.test", 1)
    system = GrpcAccess(server=server, root=Source(SourceKind.SYSTEM, "SYSTEM"))
    trusted = system.read_trust().context.get_ca_certs(binary_form=True)
    assert trusted == [ssl.PEM_cert_to_DER_cert(AUTHORITY.roots_pem.decode())]
    bundle.unlink()
    with pytest.raises(CallError, match="no trust store"):
        system.read_trust()


def test_the_configuration_says_where_and_whom_to_trust() -> None:
    token = Source(SourceKind.LITERAL, "hush")
    config = Config(
        xds_address=ServerUrl("xds.test", 1),
        ca_address=ServerUrl("ca.test", 2),
        ca_root=ROOTS,
        token=token,
        xds_headers=(("a", "b"),),
        alternative_ca_hostname="alt",
    )
    xds, ca = GrpcAccess.for_xds(config), GrpcAccess.for_ca(config)
    assert (xds.server.host, ca.server.host) == ("xds.test", "ca.test")
    assert (xds.headers, ca.headers) == ((("a", "b"),), ())
    assert (xds.alternative_hostname, ca.alternative_hostname) == (None, "alt")
    assert xds.token is ca.token is token
    assert "hush" not in repr(xds)


@pytest.mark.parametrize(("text", "lowest"), [("true", 0x303), ("", 0x304)])
def test_an_older_tls_is_taken_only_where_it_was_asked_for(text: str, lowest: int) -> None:
    config = Config(xds_address=ServerUrl("xds.test", 1), xds_root=ROOTS, tls12_enabled=bool(text))
    assert GrpcAccess.for_xds(config).read_trust().context.minimum_version == lowest


def test_the_settings_are_made_again_only_for_other_roots(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(AUTHORITY.roots_pem)
    server = ServerUrl("xds.test", 1)
    access = GrpcAccess(server=server, root=Source(SourceKind.FILE, str(path)))
    first = access.read_trust()
    assert access.read_trust(first) is first
    path.write_bytes(DevelopmentCa.create().roots_pem)
    assert access.read_trust(first).context is not first.context
