from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.certs import AUTHORITY, a_name
from ztunnel.config import Config
from ztunnel.errors import ConfigError
from ztunnel.identity.ca import CaClient
from ztunnel.identity.dev_ca import DevelopmentIssuer
from ztunnel.identity.issuer import make_issuer
from ztunnel.model.settings import ProxyMode, ServerUrl
from ztunnel.transport.pace import Pace

MESH = ServerUrl("istiod.example", 15012)


@pytest.mark.parametrize(
    ("mode", "impersonates"), [(ProxyMode.SHARED, True), (ProxyMode.DEDICATED, False)]
)
def test_the_mesh_ca_is_asked_unless_it_is_faked(mode: ProxyMode, impersonates: bool) -> None:
    issuer = make_issuer(Config(ca_address=MESH, mode=mode, secret_ttl_seconds=60), Pace())
    assert isinstance(issuer, CaClient)
    assert issuer.impersonates is impersonates
    assert issuer.ttl_seconds == 60
    assert str(issuer) == "CA https://istiod.example:15012"


async def test_a_development_ca_is_made_for_the_trust_domain() -> None:
    config = Config(fake_ca=True, trust_domain="td.example", secret_ttl_seconds=60)
    issuer = make_issuer(config, Pace())
    assert isinstance(issuer, DevelopmentIssuer)
    assert issuer.authority.trust_domain == "td.example"
    made = await issuer.issue(a_name())
    assert made.not_after - made.not_before < 200


def test_a_development_ca_may_be_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(AUTHORITY.to_pem())
    issuer = make_issuer(Config(fake_ca=True, fake_ca_path=path), Pace())
    assert isinstance(issuer, DevelopmentIssuer)
    assert issuer.authority.roots_pem == AUTHORITY.roots_pem


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_development_ca_that_cannot_be_read_stops_the_start(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"FAKE_CA=.*ca\.pem: .*root certificate and its key"):
        make_issuer(Config(fake_ca=True, fake_ca_path=path), Pace())
