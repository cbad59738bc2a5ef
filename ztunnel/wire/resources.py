"""Protobuf resources to nouns (state-and-xds.md 6 and 8).

What is malformed rejects the whole resource with a `ResourceError` that names the field. An
enumeration value that we do not know is no reason to lose a workload: it is taken as the safest
known value, and a note says so (section 16). What equals is shared between nouns: a mesh has few
namespaces, localities and port lists, and very many workloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from sys import intern
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from ztunnel.errors import ResourceError
from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Network, NetworkAddress, NetworkCidr, Port
from ztunnel.model.policy import Policy
from ztunnel.model.service import (
    BalanceMode,
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Scope,
    Service,
    Visibility,
    WeightedWaypoint,
)
from ztunnel.model.workload import (
    ApplicationTunnel,
    AppProtocol,
    GatewayAddress,
    Health,
    Locality,
    NamespacedHostname,
    NetworkMode,
    PolicyKey,
    ServiceKey,
    TunnelProtocol,
    Workload,
    WorkloadUid,
)
from ztunnel.wire.addresses import read_ip, read_network, read_port
from ztunnel.wire.pb import workload_pb2 as pb

ADDRESS_TYPE = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE = "type.googleapis.com/istio.security.Authorization"

Resource: TypeAlias = Workload | Service | Policy
T = TypeVar("T")
M = TypeVar("M", bound=Message)

DEFAULT_TRUST_DOMAIN = "cluster.local"
DEFAULT_SERVICE_ACCOUNT = "default"
DEFAULT_CLUSTER = "Kubernetes"

# A new type of string and the one string of that value, in a single call: this is done very often.
SHARED_STRINGS = 16384
_namespace = lru_cache(SHARED_STRINGS)(Namespace)
_trust_domain = lru_cache(SHARED_STRINGS)(TrustDomain)
_account = lru_cache(SHARED_STRINGS)(ServiceAccount)
_network = lru_cache(SHARED_STRINGS)(Network)

TUNNELS: Mapping[int, TunnelProtocol] = {
    pb.NONE: TunnelProtocol.NONE,
    pb.HBONE: TunnelProtocol.HBONE,
}
NETWORK_MODES: Mapping[int, NetworkMode] = {
    pb.STANDARD: NetworkMode.STANDARD,
    pb.HOST_NETWORK: NetworkMode.HOST_NETWORK,
}
HEALTH: Mapping[int, Health] = {pb.HEALTHY: Health.HEALTHY, pb.UNHEALTHY: Health.UNHEALTHY}
WORKLOAD_TYPES: Mapping[int, str] = {
    pb.DEPLOYMENT: "deployment",
    pb.CRONJOB: "cronjob",
    pb.POD: "pod",
    pb.JOB: "job",
}
APPLICATION_PROTOCOLS: Mapping[int, AppProtocol] = {
    pb.ApplicationTunnel.NONE: AppProtocol.NONE,
    pb.ApplicationTunnel.PROXY: AppProtocol.PROXY,
}
IP_FAMILIES: Mapping[int, IpFamilies | None] = {
    pb.AUTOMATIC: None,
    pb.IPV4_ONLY: IpFamilies.IPV4_ONLY,
    pb.IPV6_ONLY: IpFamilies.IPV6_ONLY,
    pb.DUAL: IpFamilies.DUAL,
}
VISIBILITY: Mapping[int, Visibility] = {
    pb.Service.PUBLIC: Visibility.PUBLIC,
    pb.Service.NAMESPACE: Visibility.NAMESPACE,
}
MODES: Mapping[int, BalanceMode] = {
    pb.LoadBalancing.UNSPECIFIED_MODE: BalanceMode.STANDARD,
    pb.LoadBalancing.STRICT: BalanceMode.STRICT,
    pb.LoadBalancing.FAILOVER: BalanceMode.FAILOVER,
    pb.LoadBalancing.PASSTHROUGH: BalanceMode.PASSTHROUGH,
}
HEALTH_POLICIES: Mapping[int, HealthPolicy] = {
    pb.LoadBalancing.ONLY_HEALTHY: HealthPolicy.ONLY_HEALTHY,
    pb.LoadBalancing.ALLOW_ALL: HealthPolicy.ALLOW_ALL,
}
SCOPES: Mapping[int, Scope] = {
    pb.LoadBalancing.REGION: Scope.REGION,
    pb.LoadBalancing.ZONE: Scope.ZONE,
    pb.LoadBalancing.SUBZONE: Scope.SUBZONE,
    pb.LoadBalancing.NODE: Scope.NODE,
    pb.LoadBalancing.CLUSTER: Scope.CLUSTER,
    pb.LoadBalancing.NETWORK: Scope.NETWORK,
}


def read_address(data: bytes, notes: list[str]) -> Workload | Service:
    """Decode an `istio.workload.Address`; what had to be guessed is added to `notes`.

    Raises:
        ResourceError: it is malformed; the text names the field.
    """
    try:
        address = pb.ReceivedAddress.FromString(data)
    except DecodeError as exc:
        raise ResourceError(f"not an Address message: {exc}") from exc
    match address.WhichOneof("type"):
        case "workload":
            return _workload(address.workload, notes)
        case "service":
            return _service(address.service, notes)
        case _:
            raise ResourceError("type: neither workload nor service is set")


def key_of(resource: Resource) -> str:
    """Return the name a resource has in xDS (section 7)."""
    return resource.uid if isinstance(resource, Workload) else resource.key


def _workload(message: pb.ReceivedWorkload, notes: list[str]) -> Workload:
    if not message.uid:
        raise ResourceError("workload.uid: empty")
    return Workload(
        uid=WorkloadUid(message.uid),
        name=message.name,
        namespace=_namespace(message.namespace),
        trust_domain=_trust_domain(message.trust_domain or DEFAULT_TRUST_DOMAIN),
        service_account=_account(message.service_account or DEFAULT_SERVICE_ACCOUNT),
        ips=tuple([read_ip(packed, "workload.addresses") for packed in message.addresses]),
        hostname=message.hostname,
        network=_network(message.network),
        # Traffic to a tunnel we cannot speak goes plain, as to a workload outside the mesh.
        protocol=TUNNELS.get(message.tunnel_protocol)
        or _guess(TunnelProtocol.NONE, message.tunnel_protocol, "tunnel_protocol", notes),
        network_mode=NETWORK_MODES.get(message.network_mode)
        or _guess(NetworkMode.STANDARD, message.network_mode, "network_mode", notes),
        native_tunnel=message.native_tunnel,
        application_tunnel=_application_tunnel(message.application_tunnel, notes)
        if message.HasField("application_tunnel")
        else None,
        waypoint=_gateway(message.waypoint, "workload.waypoint")
        if message.HasField("waypoint")
        else None,
        network_gateway=_gateway(message.network_gateway, "workload.network_gateway")
        if message.HasField("network_gateway")
        else None,
        workload_name=intern(message.workload_name),
        workload_type=WORKLOAD_TYPES.get(message.workload_type, "deployment"),
        canonical_name=intern(message.canonical_name),
        canonical_revision=intern(message.canonical_revision),
        node=intern(message.node),
        cluster_id=intern(message.cluster_id or DEFAULT_CLUSTER),
        locality=_locality(message.locality),
        health=HEALTH.get(message.status)
        or _guess(Health.UNHEALTHY, message.status, "status", notes),
        capacity=message.capacity.value if message.HasField("capacity") else 1,
        policies=_policy_keys(tuple(message.authorization_policies)),
        services=_services(message.services),
    )


def _guess(fallback: T, number: int, field: str, notes: list[str]) -> T:
    """Return what an enumeration value that we do not know is taken as, and note it."""
    notes.append(f"{field}: {number} is not known; taken as {fallback}")
    return fallback


@lru_cache(maxsize=4096)
def _locality(encoded: bytes) -> Locality:
    """Return where a workload is; a zone has very many."""
    place = _decoded(pb.Locality, encoded, "workload.locality")
    return Locality(place.region, place.zone, place.subzone)


@lru_cache(maxsize=4096)
def _policy_keys(names: tuple[str, ...]) -> tuple[PolicyKey, ...]:
    return tuple(PolicyKey(name) for name in names)


def _services(entries: Sequence[bytes]) -> dict[ServiceKey, dict[Port, Port]]:
    # A map on the wire has no order of its own, and equal ones are to be shared.
    return _shared_services(tuple(entries if len(entries) < 2 else sorted(entries)))  # noqa: PLR2004


@lru_cache(maxsize=16384)
def _shared_services(entries: tuple[bytes, ...]) -> dict[ServiceKey, dict[Port, Port]]:
    """Return the services of a workload; the pods of a deployment share one dictionary."""
    field = "workload.services"
    services = {}
    for encoded in entries:
        entry = _decoded(pb.WorkloadService, encoded, field)
        if "/" not in entry.key:
            raise ResourceError(f"{field}: {entry.key!r} is not namespace/hostname")
        services[ServiceKey(intern(entry.key))] = _shared_ports(entry.value.SerializeToString())
    return services


@lru_cache(maxsize=4096)
def _shared_ports(encoded: bytes) -> dict[Port, Port]:
    """Return a list of ports; very many services have the same."""
    field = "workload.services"
    return {
        read_port(port.service_port, field): read_port(port.target_port, field)
        for port in pb.PortList.FromString(encoded).ports
    }


def _decoded(kind: type[M], encoded: bytes, field: str) -> M:
    try:
        return kind.FromString(encoded)
    except DecodeError as exc:
        raise ResourceError(f"{field}: {exc}") from exc


def _application_tunnel(
    message: pb.ApplicationTunnel, notes: list[str]
) -> ApplicationTunnel | None:
    protocol = APPLICATION_PROTOCOLS.get(message.protocol)
    if protocol is None:
        # Bytes in a wrong form would be misread; without the tunnel the traffic is refused.
        notes.append(f"application_tunnel.protocol: {message.protocol} is not known; no tunnel")
        return None
    port = read_port(message.port, "workload.application_tunnel.port")
    return ApplicationTunnel(protocol, port or None)


def _gateway(message: pb.GatewayAddress, field: str) -> GatewayAddress:
    port = read_port(message.hbone_mtls_port, f"{field}.hbone_mtls_port")
    match message.WhichOneof("destination"):
        case "hostname":
            name = message.hostname
            return _shared_gateway(name.namespace, name.hostname, port)
        case "address":
            address = message.address
            ip = read_ip(address.address, f"{field}.address")
            return GatewayAddress(NetworkAddress(_network(address.network), ip), port)
        case _:
            raise ResourceError(f"{field}: neither hostname nor address is set")


@lru_cache(maxsize=4096)
def _shared_gateway(namespace: str, hostname: str, port: Port) -> GatewayAddress:
    return GatewayAddress(NamespacedHostname(_namespace(namespace), hostname), port)


def _service(message: pb.Service, notes: list[str]) -> Service:
    if not message.hostname:
        raise ResourceError("service.hostname: empty")
    vips, ranges = _vips(message)
    return Service(
        name=message.name,
        namespace=_namespace(message.namespace),
        hostname=message.hostname,
        vips=vips,
        cidr_vips=ranges,
        ports={
            read_port(port.service_port, "service.ports"): read_port(
                port.target_port, "service.ports"
            )
            for port in message.ports
        },
        subject_alt_names=tuple(message.subject_alt_names),
        waypoint=_gateway(message.waypoint, "service.waypoint")
        if message.HasField("waypoint")
        else None,
        weighted_waypoints=tuple(
            WeightedWaypoint(
                _gateway(choice.destination, "service.weighted_waypoints"), choice.weight
            )
            for choice in message.weighted_waypoints
        ),
        load_balancer=_load_balancer(message.load_balancing, notes)
        if message.HasField("load_balancing")
        else None,
        ip_families=_ip_families(message.ip_families, notes),
        canonical=message.canonical,
        # As in the reference: an unknown number is public.
        visibility=VISIBILITY.get(message.visibility, Visibility.PUBLIC),
    )


def _vips(message: pb.Service) -> tuple[tuple[NetworkAddress, ...], tuple[NetworkCidr, ...]]:
    vips: list[NetworkAddress] = []
    ranges: list[NetworkCidr] = []
    field = "service.addresses"
    for vip in message.addresses:
        network = _network(vip.network)
        if not vip.HasField("length") or vip.length == 8 * len(vip.address):
            vips.append(NetworkAddress(network, read_ip(vip.address, field)))
        else:
            ranges.append(NetworkCidr(network, read_network(vip.address, vip.length, field)))
    return tuple(vips), tuple(ranges)


def _ip_families(number: int, notes: list[str]) -> IpFamilies | None:
    if number not in IP_FAMILIES:
        notes.append(f"ip_families: {number} is not known; no restriction")
    return IP_FAMILIES.get(number)


def _load_balancer(message: pb.LoadBalancing, notes: list[str]) -> LoadBalancer:
    preferences = []
    for number in message.routing_preference:
        if scope := SCOPES.get(number):
            preferences.append(scope)
        else:
            notes.append(f"load_balancing.routing_preference: {number} is not known; ignored")
    return LoadBalancer(
        routing_preferences=tuple(preferences),
        mode=MODES.get(message.mode)
        or _guess(BalanceMode.STANDARD, message.mode, "load_balancing.mode", notes),
        health_policy=HEALTH_POLICIES.get(message.health_policy)
        or _guess(
            HealthPolicy.ONLY_HEALTHY, message.health_policy, "load_balancing.health_policy", notes
        ),
    )
