"""Who makes this node's certificates: the mesh's CA, or an authority in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.errors import ConfigError
from ztunnel.identity.ca import CaClient
from ztunnel.identity.dev_ca import DevelopmentCa, DevelopmentIssuer
from ztunnel.model.settings import ProxyMode
from ztunnel.transport.grpc import GrpcClient
from ztunnel.transport.grpc_access import GrpcAccess

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.transport.pace import Pace


def make_issuer(config: Config, pace: Pace) -> CaClient | DevelopmentIssuer:
    """Make what the operator chose; nothing is connected yet.

    Raises:
        ConfigError: the file of the development CA cannot be read.
    """
    if config.fake_ca:
        return DevelopmentIssuer(_authority(config), ttl_seconds=config.secret_ttl_seconds)
    assert config.ca_address is not None
    return CaClient(
        caller=GrpcClient(GrpcAccess.for_ca(config), pace),
        pace=pace,
        address=str(config.ca_address),
        ttl_seconds=config.secret_ttl_seconds,
        impersonates=config.mode is ProxyMode.SHARED,
    )


def _authority(config: Config) -> DevelopmentCa:
    if config.fake_ca_path is None:
        return DevelopmentCa.create(config.trust_domain)
    try:
        return DevelopmentCa.from_pem(config.fake_ca_path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"FAKE_CA={config.fake_ca_path}: {error}; it must hold a root certificate and its key"
        ) from error
