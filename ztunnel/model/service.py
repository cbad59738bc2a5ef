"""The name many workloads share (state-and-xds.md 6.2, `istio.workload.Service`)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ztunnel.model.identity import Namespace
from ztunnel.model.network import NetworkAddress, NetworkCidr, Port
from ztunnel.model.workload import GatewayAddress, ServiceKey


class Scope(StrEnum):
    """One step of locality preference."""

    REGION = "Region"
    ZONE = "Zone"
    SUBZONE = "Subzone"
    NODE = "Node"
    CLUSTER = "Cluster"
    NETWORK = "Network"


class BalanceMode(StrEnum):
    """How endpoints are chosen."""

    STANDARD = "Standard"
    STRICT = "Strict"
    FAILOVER = "Failover"
    PASSTHROUGH = "Passthrough"


class HealthPolicy(StrEnum):
    """Which endpoints count."""

    ONLY_HEALTHY = "OnlyHealthy"
    ALLOW_ALL = "AllowAll"


class IpFamilies(StrEnum):
    """Address families a service offers."""

    DUAL = "Dual"
    IPV4_ONLY = "IPv4"
    IPV6_ONLY = "IPv6"


class Visibility(StrEnum):
    """Who may see the service."""

    PUBLIC = "Public"
    NAMESPACE = "Namespace"


class LoadBalancer(msgspec.Struct, frozen=True, gc=False):
    """How to choose among endpoints."""

    routing_preferences: tuple[Scope, ...] = ()
    mode: BalanceMode = BalanceMode.STANDARD
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


class WeightedWaypoint(msgspec.Struct, frozen=True, gc=False):
    """One of several waypoints of a service."""

    destination: GatewayAddress
    weight: int


class Service(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A VIP or host name. Key: (namespace, hostname)."""

    name: str
    namespace: Namespace
    hostname: str
    vips: tuple[NetworkAddress, ...] = ()
    cidr_vips: tuple[NetworkCidr, ...] = ()
    ports: dict[Port, Port] = {}  # service port -> target port; 0 = named, look at the endpoint
    subject_alt_names: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    load_balancer: LoadBalancer | None = None
    ip_families: IpFamilies | None = None
    canonical: bool = False
    visibility: Visibility = Visibility.PUBLIC

    @property
    def key(self) -> ServiceKey:
        """`namespace/hostname`."""
        return ServiceKey(f"{self.namespace}/{self.hostname}")
