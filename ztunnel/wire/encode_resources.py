"""Nouns to protobuf resources: what a control plane sends (state-and-xds.md 6).

The inverse of `resources` and `policies`; defaults are left out, as istiod does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztunnel.model.network import IpNetwork, NetworkAddress, Port
from ztunnel.model.policy import Match, MatchKind, Policy
from ztunnel.model.service import LoadBalancer, Service
from ztunnel.model.workload import GatewayAddress, Locality, Workload
from ztunnel.wire import policies, resources
from ztunnel.wire.pb import security_pb2, workload_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource


def _numbers(table: Mapping[int, object]) -> dict[object, int]:
    return {meaning: number for number, meaning in table.items()}


_TUNNELS = _numbers(resources.TUNNELS)
_NETWORK_MODES = _numbers(resources.NETWORK_MODES)
_HEALTH = _numbers(resources.HEALTH)
_WORKLOAD_TYPES = _numbers(resources.WORKLOAD_TYPES)
_APPLICATION_PROTOCOLS = _numbers(resources.APPLICATION_PROTOCOLS)
_IP_FAMILIES = _numbers(resources.IP_FAMILIES)
_VISIBILITY = _numbers(resources.VISIBILITY)
_MODES = _numbers(resources.MODES)
_HEALTH_POLICIES = _numbers(resources.HEALTH_POLICIES)
_LOCALITY_SCOPES = _numbers(resources.SCOPES)
_POLICY_SCOPES = _numbers(policies.SCOPES)
_ACTIONS = _numbers(policies.ACTIONS)


def type_of(resource: Resource) -> str:
    """Return the type URL under which a resource is sent."""
    return AUTHORIZATION_TYPE if isinstance(resource, Policy) else ADDRESS_TYPE


def encode(resource: Resource) -> bytes:
    """Encode a resource, the same bytes each time, so that a digest of them is a version."""
    if isinstance(resource, Policy):
        return _policy(resource).SerializeToString(deterministic=True)
    if isinstance(resource, Workload):
        address = pb.Address(workload=_workload(resource))
    else:
        address = pb.Address(service=_service(resource))
    return address.SerializeToString(deterministic=True)


def aliases_of(resource: Resource) -> list[str]:
    """Return the other names by which a client may ask for a resource (section 7)."""
    if isinstance(resource, Workload):
        return [f"{resource.network}/{ip}" for ip in resource.ips]
    if isinstance(resource, Service):
        ranges = [f"{vip.network}/{vip.cidr}" for vip in resource.cidr_vips]
        return [str(vip) for vip in resource.vips] + ranges
    return []


def _workload(workload: Workload) -> pb.Workload:
    message = pb.Workload(
        uid=workload.uid,
        name=workload.name,
        namespace=workload.namespace,
        addresses=[ip.packed for ip in workload.ips],
        hostname=workload.hostname,
        network=workload.network,
        trust_domain=workload.trust_domain,
        service_account=workload.service_account,
        node=workload.node,
        canonical_name=workload.canonical_name,
        canonical_revision=workload.canonical_revision,
        workload_name=workload.workload_name,
        native_tunnel=workload.native_tunnel,
        authorization_policies=workload.policies,
        cluster_id=workload.cluster_id,
        waypoint=_gateway(workload.waypoint),
        network_gateway=_gateway(workload.network_gateway),
        services={key: pb.PortList(ports=_ports(p)) for key, p in workload.services.items()},
        locality=_locality(workload.locality),
    )
    message.tunnel_protocol = _TUNNELS[workload.protocol]  # type: ignore[assignment]  # an int
    message.network_mode = _NETWORK_MODES[workload.network_mode]  # type: ignore[assignment]
    message.status = _HEALTH[workload.health]  # type: ignore[assignment]
    message.workload_type = _WORKLOAD_TYPES.get(workload.workload_type, 0)  # type: ignore[assignment]
    if workload.capacity != 1:
        message.capacity.value = workload.capacity
    if tunnel := workload.application_tunnel:
        message.application_tunnel.protocol = _APPLICATION_PROTOCOLS[tunnel.protocol]  # type: ignore[assignment]
        message.application_tunnel.port = tunnel.port or 0
        message.application_tunnel.SetInParent()  # present, even with nothing but defaults
    return message


def _service(service: Service) -> pb.Service:
    vips = [_address(vip) for vip in service.vips]
    ranges = [_range(vip.network, vip.cidr) for vip in service.cidr_vips]
    message = pb.Service(
        name=service.name,
        namespace=service.namespace,
        hostname=service.hostname,
        addresses=vips + ranges,
        ports=_ports(service.ports),
        subject_alt_names=service.subject_alt_names,
        waypoint=_gateway(service.waypoint),
        weighted_waypoints=[
            pb.WeightedWaypoint(destination=_gateway(choice.destination), weight=choice.weight)
            for choice in service.weighted_waypoints
        ],
        load_balancing=_load_balancer(service.load_balancer),
        canonical=service.canonical,
    )
    message.ip_families = _IP_FAMILIES[service.ip_families]  # type: ignore[assignment]  # an int
    message.visibility = _VISIBILITY[service.visibility]  # type: ignore[assignment]
    return message


def _load_balancer(balancer: LoadBalancer | None) -> pb.LoadBalancing | None:
    if balancer is None:
        return None
    message = pb.LoadBalancing()
    message.routing_preference.extend(
        _LOCALITY_SCOPES[scope]  # type: ignore[misc]  # an int
        for scope in balancer.routing_preferences
    )
    message.mode = _MODES[balancer.mode]  # type: ignore[assignment]
    message.health_policy = _HEALTH_POLICIES[balancer.health_policy]  # type: ignore[assignment]
    return message


def _locality(place: Locality) -> pb.Locality | None:
    if place == Locality():
        return None
    return pb.Locality(region=place.region, zone=place.zone, subzone=place.subzone)


def _ports(ports: Mapping[Port, Port]) -> list[pb.Port]:
    return [pb.Port(service_port=port, target_port=target) for port, target in ports.items()]


def _gateway(gateway: GatewayAddress | None) -> pb.GatewayAddress | None:
    if gateway is None:
        return None
    destination, port = gateway.destination, gateway.hbone_mtls_port
    if isinstance(destination, NetworkAddress):
        return pb.GatewayAddress(address=_address(destination), hbone_mtls_port=port)
    name = pb.NamespacedHostname(namespace=destination.namespace, hostname=destination.hostname)
    return pb.GatewayAddress(hostname=name, hbone_mtls_port=port)


def _address(address: NetworkAddress) -> pb.NetworkAddress:
    return pb.NetworkAddress(network=address.network, address=address.ip.packed)


def _range(network: str, cidr: IpNetwork) -> pb.NetworkAddress:
    packed = cidr.network_address.packed
    return pb.NetworkAddress(network=network, address=packed, length=cidr.prefixlen)


def _policy(policy: Policy) -> security_pb2.Authorization:
    message = security_pb2.Authorization(
        name=policy.name, namespace=policy.namespace, dry_run=policy.dry_run
    )
    message.scope = _POLICY_SCOPES[policy.scope]  # type: ignore[assignment]  # an int
    message.action = _ACTIONS[policy.action]  # type: ignore[assignment]
    for rule in policy.rules:
        clauses = message.rules.add().clauses
        for clause in rule:
            clauses.add().matches.extend(_match(match) for match in clause)
    return message


def _match(match: Match) -> security_pb2.Match:
    message = security_pb2.Match()
    for name in policies.STRING_FIELDS:
        for text in getattr(match, name):
            target = getattr(message, name).add()
            if text.kind is MatchKind.PRESENCE:
                target.presence.SetInParent()
            else:
                setattr(target, text.kind.lower(), text.text)
    for name in policies.ADDRESS_FIELDS:
        getattr(message, name).extend(_cidrs(getattr(match, name)))
    for name in policies.PORT_FIELDS:
        getattr(message, name).extend(getattr(match, name))
    for name in policies.ACCOUNT_FIELDS:
        for account in getattr(match, name):
            getattr(message, name).add(
                namespace=account.namespace, service_account=account.service_account
            )
    return message


def _cidrs(cidrs: Iterable[IpNetwork]) -> list[security_pb2.Address]:
    return [
        security_pb2.Address(address=cidr.network_address.packed, length=cidr.prefixlen)
        for cidr in cidrs
    ]
