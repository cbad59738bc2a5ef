"""Services and waypoints of Kubernetes as istiod converts them (state-and-xds.md 15)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ztunnel.devmesh.kubernetes_policies import mapping, sequence
from ztunnel.errors import ResourceError
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Network, NetworkAddress, Port, parse_ip, parse_port
from ztunnel.model.service import (
    BalanceMode,
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Scope,
    Service,
)
from ztunnel.model.workload import HBONE_PORT, GatewayAddress, NamespacedHostname

GATEWAY_NAME_LABEL = "gateway.networking.k8s.io/gateway-name"
USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
WAYPOINT_FOR = "istio.io/waypoint-for"
NAMED_PORT = Port(0)  # look at the endpoint

_SAME_ZONE = (Scope.NETWORK, Scope.REGION, Scope.ZONE)
_DISTRIBUTIONS = {
    "PreferClose": _SAME_ZONE,
    "PreferSameZone": _SAME_ZONE,
    "PreferSameNode": (*_SAME_ZONE, Scope.SUBZONE, Scope.NODE),
}
_FAMILIES = {
    ("IPv4",): IpFamilies.IPV4_ONLY,
    ("IPv6",): IpFamilies.IPV6_ONLY,
    ("IPv4", "IPv6"): IpFamilies.DUAL,
    ("IPv6", "IPv4"): IpFamilies.DUAL,
}


@dataclass(frozen=True, slots=True)
class Waypoints:
    """Which gateways there are, with their labels, and who uses which."""

    gateways: Mapping[tuple[str, str], Mapping[str, str]]
    domain: str
    namespaces: Mapping[str, Mapping[str, str]]

    def of_service(self, namespace: str, labels: Mapping[str, str]) -> GatewayAddress | None:
        """Return the waypoint of a service."""
        return self._find(namespace, labels, {"service", "all"})

    def of_workload(self, namespace: str, labels: Mapping[str, str]) -> GatewayAddress | None:
        """Return the waypoint of a workload; a waypoint itself has none."""
        if GATEWAY_NAME_LABEL in labels:
            return None
        return self._find(namespace, labels, {"workload", "all"})

    def _find(
        self, namespace: str, labels: Mapping[str, str], serving: set[str]
    ) -> GatewayAddress | None:
        chosen = labels if USE_WAYPOINT in labels else self.namespaces.get(namespace, {})
        name = chosen.get(USE_WAYPOINT, "none")
        place = chosen.get(USE_WAYPOINT_NAMESPACE, namespace)
        gateway = self.gateways.get((place, name))
        if gateway is None or gateway.get(WAYPOINT_FOR, "service") not in serving:
            return None
        hostname = NamespacedHostname(Namespace(place), hostname_of(name, place, self.domain))
        return GatewayAddress(hostname, HBONE_PORT)


def hostname_of(name: str, namespace: str, domain: str) -> str:
    """Return the DNS name of a service."""
    return f"{name}.{namespace}.svc.{domain}"


def waypoint_service(name: str, namespace: str, domain: str) -> Service:
    """Make the service that a Gateway gets on a real cluster."""
    return Service(
        name=name,
        namespace=Namespace(namespace),
        hostname=hostname_of(name, namespace, domain),
        ports={HBONE_PORT: HBONE_PORT},
        canonical=True,
    )


def read_service(
    name: str,
    namespace: str,
    spec: Mapping[str, object],
    *,
    waypoint: GatewayAddress | None,
    domain: str,
) -> Service:
    """Convert a Service.

    Raises:
        ResourceError | ValueError: it is malformed.
    """
    given = sequence(spec.get("clusterIPs"), "clusterIPs") or [spec.get("clusterIP")]
    vips = [parse_ip(str(vip)) for vip in given if vip not in {None, "", "None"}]
    families = tuple(str(family) for family in sequence(spec.get("ipFamilies"), "ipFamilies"))
    # Where a manifest is silent, an API server fills them in.
    families = families or tuple(f"IPv{ip.version}" for ip in vips)
    return Service(
        name=name,
        namespace=Namespace(namespace),
        hostname=hostname_of(name, namespace, domain),
        vips=tuple(NetworkAddress(Network(""), ip) for ip in vips),
        ports={
            port: target if isinstance(target, int) else NAMED_PORT for port, target in _ports(spec)
        },
        waypoint=waypoint,
        load_balancer=_load_balancer(spec),
        ip_families=_FAMILIES.get(families),
        canonical=True,
    )


def selector_of(spec: Mapping[str, object]) -> dict[str, str]:
    """Return the labels a Service selects its pods by; empty for one that selects none."""
    return {key: str(value) for key, value in mapping(spec.get("selector"), "selector").items()}


def served_ports(spec: Mapping[str, object], pod_spec: Mapping[str, object]) -> dict[Port, Port]:
    """Return which ports of a Service a pod serves, and where; unknown names are left out."""
    named: dict[str, Port] = {}
    for item in sequence(pod_spec.get("containers"), "containers"):
        container = mapping(item, "containers")
        for port in sequence(container.get("ports"), "ports"):
            declared = mapping(port, "ports")
            named[str(declared.get("name"))] = parse_port(str(declared.get("containerPort")))
    served: dict[Port, Port] = {}
    for port, target in _ports(spec):
        number = target if isinstance(target, int) else named.get(target)
        if number is not None:
            served[port] = Port(number)
    return served


def _ports(spec: Mapping[str, object]) -> Iterator[tuple[Port, Port | str]]:
    """Yield the TCP ports of a Service with their targets: a number, or a name."""
    for item in sequence(spec.get("ports"), "ports"):
        entry = mapping(item, "ports")
        if entry.get("protocol", "TCP") != "TCP":
            continue
        port = parse_port(str(entry.get("port")))
        target = str(entry.get("targetPort", port))
        yield port, parse_port(target) if target.isdigit() else target


def _load_balancer(spec: Mapping[str, object]) -> LoadBalancer | None:
    not_ready_too = spec.get("publishNotReadyAddresses") is True
    health = HealthPolicy.ALLOW_ALL if not_ready_too else HealthPolicy.ONLY_HEALTHY
    if spec.get("internalTrafficPolicy") == "Local":
        return LoadBalancer((Scope.NODE,), BalanceMode.STRICT, health)
    distribution = spec.get("trafficDistribution")
    if distribution is not None and str(distribution) not in _DISTRIBUTIONS:
        raise ResourceError(f"trafficDistribution: {distribution!r} is not known")
    if distribution is not None:
        return LoadBalancer(_DISTRIBUTIONS[str(distribution)], BalanceMode.FAILOVER, health)
    return LoadBalancer((), BalanceMode.STANDARD, health) if not_ready_too else None
