"""Puts together what all workloads of a node share, from what differs between processes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ztunnel.decide.classify import illegal_ports
from ztunnel.proxy.context import NodeContext
from ztunnel.proxy.handshakes import Handshakes
from ztunnel.telemetry.access_log import AccessLog
from ztunnel.telemetry.log import PIPELINE
from ztunnel.wire.hbone.settings import HboneSettings

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.proxy.context import AddressSource, CertificateSource
    from ztunnel.state.store import Store
    from ztunnel.telemetry.metrics import Metrics
    from ztunnel.tls.context import TlsContexts
    from ztunnel.transport.reactor import Reactor


def make_node(
    config: Config,
    *,
    store: Store,
    certificates: CertificateSource,
    tls: TlsContexts,
    metrics: Metrics,
    demand: AddressSource | None,
    reactor: Reactor,
) -> NodeContext:
    """Make a node's context; the caller must run the reactor."""
    return NodeContext(
        config=config,
        store=store,
        certificates=certificates,
        tls=tls,
        reactor=reactor,
        access_log=AccessLog(PIPELINE),
        metrics=metrics,
        rng=random.Random(),  # noqa: S311 - balancing and trace ids, no secret
        handshakes=Handshakes(config.max_handshakes),
        client_settings=hbone_settings(config, client=True),
        server_settings=hbone_settings(config, client=False),
        illegal_ports=illegal_ports(has_socks5=config.socks5_enabled),
        demand=demand,
    )


def hbone_settings(config: Config, *, client: bool) -> HboneSettings:
    """Choose what we announce in HTTP/2."""
    return HboneSettings(
        stream_window=config.stream_window_bytes,
        connection_window=config.connection_window_bytes,
        max_frame_size=config.frame_bytes,
        max_concurrent_streams=config.max_streams_per_tunnel,
        max_header_list_size=None if client else config.max_header_bytes,
    )
