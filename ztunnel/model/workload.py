"""One running instance in the mesh (state-and-xds.md 6.2, `istio.workload.Workload`).

`msgspec.Struct(gc=False)`: a node may know 100 000 of these (performance.md 7 and 15).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

import msgspec

from ztunnel.model.identity import Identity, Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import IpAddress, Network, NetworkAddress, Port

WorkloadUid = NewType("WorkloadUid", str)
PodUid = NewType("PodUid", str)  # the uid the node agent names a pod by; not the workload's uid
PolicyKey = NewType("PolicyKey", str)  # "namespace/name"
ServiceKey = NewType("ServiceKey", str)  # "namespace/hostname"

HBONE_PORT = Port(15008)


class TunnelProtocol(StrEnum):
    """How to reach the workload; values are the static configuration's spelling."""

    NONE = "TCP"
    HBONE = "HBONE"


class NetworkMode(StrEnum):
    """Whether the workload has addresses of its own."""

    STANDARD = "Standard"
    HOST_NETWORK = "HostNetwork"


class Health(StrEnum):
    """Whether the workload wants traffic."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


class AppProtocol(StrEnum):
    """What an application tunnel puts before the bytes."""

    NONE = "NONE"
    PROXY = "PROXY"


class Locality(msgspec.Struct, frozen=True, gc=False):
    """Where it runs."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


class NamespacedHostname(msgspec.Struct, frozen=True, gc=False):
    """How a gateway or service is named when it is not an address."""

    namespace: Namespace
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


class GatewayAddress(msgspec.Struct, frozen=True, gc=False):
    """Reference to a waypoint or network gateway."""

    destination: NetworkAddress | NamespacedHostname
    hbone_mtls_port: Port


class ApplicationTunnel(msgspec.Struct, frozen=True, gc=False):
    """How the application wants the bytes it gets out of a tunnel."""

    protocol: AppProtocol = AppProtocol.NONE
    port: Port | None = None


class Workload(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A pod, VM or ServiceEntry endpoint. Key: `uid`."""

    uid: WorkloadUid = WorkloadUid("")
    name: str = ""
    namespace: Namespace = Namespace("")
    trust_domain: TrustDomain = TrustDomain("")
    service_account: ServiceAccount = ServiceAccount("")
    ips: tuple[IpAddress, ...] = ()
    hostname: str = ""
    network: Network = Network("")
    protocol: TunnelProtocol = TunnelProtocol.NONE
    network_mode: NetworkMode = NetworkMode.STANDARD
    native_tunnel: bool = False
    application_tunnel: ApplicationTunnel | None = None
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    workload_name: str = ""
    workload_type: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    node: str = ""
    cluster_id: str = ""
    locality: Locality = Locality()
    health: Health = Health.HEALTHY
    capacity: int = 1
    policies: tuple[PolicyKey, ...] = ()
    # service key -> {service port: target port}
    services: dict[ServiceKey, dict[Port, Port]] = {}

    @property
    def identity(self) -> Identity:
        """The SPIFFE identity this workload must present."""
        return Identity(self.trust_domain, self.namespace, self.service_account)
