"""Workload, service and policy as the static configuration writes them (state-and-xds.md 14)."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from ipaddress import ip_network
from typing import TypeAlias, TypeVar, cast

import yaml

from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import (
    PORT_MAX,
    IpAddress,
    IpNetwork,
    Network,
    NetworkAddress,
    NetworkCidr,
    Port,
    parse_ip,
)
from ztunnel.model.policy import (
    Action,
    Match,
    MatchKind,
    Policy,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
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
from ztunnel.xds.fields import Field, integer_up_to

H = TypeVar("H", bound=Hashable)
_PortPairs: TypeAlias = tuple[tuple[Port, Port], ...]

CAPACITY_MAX = 2**32 - 1  # uint32 on the wire
SHARED = 4096  # different places, sets of services and so on; more are simply not shared

WORKLOAD_KEYS = frozenset(
    (
        *("uid", "name", "namespace", "trustDomain", "serviceAccount", "network", "node"),
        *("hostname", "clusterId", "workloadName", "workloadType", "canonicalName"),
        *("canonicalRevision", "workloadIps", "protocol", "networkMode", "status"),
        *("nativeTunnel", "applicationTunnel", "waypoint", "networkGateway"),
        *("authorizationPolicies", "locality", "capacity", "services"),
    )
)
SERVICE_KEYS = frozenset(
    (
        *("name", "namespace", "hostname", "vips", "cidrVips", "ports", "endpoints"),
        *("subjectAltNames", "waypoint", "weightedWaypoints", "loadBalancer", "ipFamilies"),
        *("canonical", "visibility"),
    )
)
POLICY_KEYS = ("name", "namespace", "scope", "action", "dryRun", "rules")
TEXT_MATCH_KEYS = ("namespaces", "notNamespaces", "principals", "notPrincipals")
MATCH_KEYS = frozenset(
    (
        *TEXT_MATCH_KEYS,
        *("serviceAccounts", "notServiceAccounts", "sourceIps", "notSourceIps"),
        *("destinationIps", "notDestinationIps", "destinationPorts", "notDestinationPorts"),
    )
)

_MATCH_KINDS = {kind.value: kind for kind in MatchKind}
_parse_port = integer_up_to(PORT_MAX)


def read_workload(field: Field) -> Workload:
    """Read one workload; where it has no uid it gets the one a control plane would make."""
    obj = field.object(WORKLOAD_KEYS, required=("workloadIps", "namespace", "services"))
    name, namespace, cluster = obj.text("name"), obj.text("namespace"), obj.text("clusterId")
    uid = obj.text("uid") or (f"{cluster}//Pod/{namespace}/{name}" if name else "")
    if not uid:
        field.wrong("a workload needs a `uid`, or a `name` to make one from")
    return Workload(
        uid=WorkloadUid(uid),
        name=name,
        namespace=Namespace(namespace),
        trust_domain=TrustDomain(obj.text("trustDomain")),
        service_account=ServiceAccount(obj.text("serviceAccount")),
        ips=obj.each("workloadIps", lambda item: item.parse(_ip)),
        hostname=obj.text("hostname"),
        network=Network(obj.text("network")),
        protocol=obj.choice("protocol", TunnelProtocol, TunnelProtocol.NONE),
        network_mode=obj.choice("networkMode", NetworkMode, NetworkMode.STANDARD),
        native_tunnel=obj.boolean("nativeTunnel"),
        application_tunnel=obj.maybe("applicationTunnel", _application_tunnel),
        waypoint=obj.maybe("waypoint", _gateway),
        network_gateway=obj.maybe("networkGateway", _gateway),
        workload_name=obj.text("workloadName"),
        workload_type=obj.text("workloadType"),
        canonical_name=obj.text("canonicalName"),
        canonical_revision=obj.text("canonicalRevision"),
        node=obj.text("node"),
        cluster_id=cluster,
        locality=obj.read("locality", _locality, Locality()),
        health=obj.choice("status", Health, Health.HEALTHY),
        capacity=obj.read("capacity", lambda item: item.parse(integer_up_to(CAPACITY_MAX)), 1),
        policies=_the_one(obj.each("authorizationPolicies", lambda item: item.parse(_policy_key))),
        services=obj.read("services", _services_of_workload, {}),
    )


def read_service(field: Field) -> Service:
    """Read one service; `endpoints` are checked but not kept: workloads say what they serve."""
    obj = field.object(SERVICE_KEYS, required=("name", "namespace", "hostname", "vips", "ports"))
    obj.maybe("endpoints", _endpoint_names)
    return Service(
        name=obj.text("name"),
        namespace=Namespace(obj.text("namespace")),
        hostname=obj.text("hostname"),
        vips=obj.each("vips", lambda item: item.parse(_network_address)),
        cidr_vips=obj.each("cidrVips", _network_cidr),
        ports=obj.read("ports", _ports, {}),
        subject_alt_names=obj.each("subjectAltNames", Field.text),
        waypoint=obj.maybe("waypoint", _gateway),
        weighted_waypoints=obj.each("weightedWaypoints", _weighted_waypoint),
        load_balancer=obj.maybe("loadBalancer", _load_balancer),
        ip_families=obj.maybe("ipFamilies", lambda item: item.choice(IpFamilies)),
        canonical=obj.boolean("canonical"),
        visibility=obj.choice("visibility", Visibility, Visibility.PUBLIC),
    )


def read_policy(field: Field) -> Policy:
    """Read one policy: rules of clauses of matches."""
    obj = field.object(frozenset(POLICY_KEYS), required=POLICY_KEYS)
    return Policy(
        name=obj.text("name"),
        namespace=Namespace(obj.text("namespace")),
        scope=obj.choice("scope", PolicyScope, PolicyScope.GLOBAL),
        action=obj.choice("action", Action, Action.DENY),
        dry_run=obj.boolean("dryRun"),
        rules=obj.each("rules", lambda rule: rule.each(lambda clause: clause.each(_match))),
    )


def _match(field: Field) -> Match:
    obj = field.object(MATCH_KEYS)
    return Match(
        namespaces=obj.each("namespaces", _string_match),
        not_namespaces=obj.each("notNamespaces", _string_match),
        principals=obj.each("principals", _string_match),
        not_principals=obj.each("notPrincipals", _string_match),
        service_accounts=obj.each("serviceAccounts", _service_account),
        not_service_accounts=obj.each("notServiceAccounts", _service_account),
        source_ips=obj.each("sourceIps", _cidr_field),
        not_source_ips=obj.each("notSourceIps", _cidr_field),
        destination_ips=obj.each("destinationIps", _cidr_field),
        not_destination_ips=obj.each("notDestinationIps", _cidr_field),
        destination_ports=obj.each("destinationPorts", _port),
        not_destination_ports=obj.each("notDestinationPorts", _port),
    )


def _string_match(field: Field) -> StringMatch | None:
    """Read `!Exact text` or `{Exact: text}`; PRESENCE carries nothing."""
    inner = field
    name = field.node.tag.removeprefix("!")
    if name == field.node.tag:
        entries = list(field.entries()) if isinstance(field.node, yaml.MappingNode) else []
        if len(entries) != 1:
            field.wrong("write one of !Exact, !Prefix, !Suffix or !Presence before the text")
            return None
        key, inner = entries[0]
        name = str(key.node.value)
    kind = _MATCH_KINDS.get(name)
    if kind is None:
        field.wrong(f"{name!r} is no way to match; use Exact, Prefix, Suffix or Presence")
        return None
    if kind is MatchKind.PRESENCE:
        return StringMatch(kind)
    text = inner.text()
    return None if text is None else StringMatch(kind, text)


def _service_account(field: Field) -> ServiceAccountMatch:
    names = ("namespace", "serviceAccount")
    obj = field.object(frozenset(names), required=names)
    return ServiceAccountMatch(
        Namespace(obj.text("namespace")), ServiceAccount(obj.text("serviceAccount"))
    )


def _services_of_workload(field: Field) -> dict[ServiceKey, dict[Port, Port]]:
    """Read a map of service to ports; a mere list, as in the config dump, maps no ports."""
    listed: list[tuple[ServiceKey, _PortPairs]] = []
    if isinstance(field.node, yaml.SequenceNode):
        listed = [(key, ()) for item in field.items() if (key := item.parse(_service_key))]
    else:
        for name, ports in field.entries():
            if key := name.parse(_service_key):
                listed.append((key, tuple(_ports(ports).items())))
    return _shared_services(tuple(listed))


@lru_cache(maxsize=SHARED)
def _shared_services(
    listed: tuple[tuple[ServiceKey, _PortPairs], ...],
) -> dict[ServiceKey, dict[Port, Port]]:
    """Return the services of a workload; the pods of a deployment share one dictionary."""
    return {key: dict(ports) for key, ports in listed}


def _the_one(value: H) -> H:
    """Return the first of all that are equal to this, so that it is there once."""
    return cast("H", _first(value))


@lru_cache(maxsize=SHARED)
def _first(value: Hashable) -> Hashable:
    return value


def _endpoint_names(field: Field) -> tuple[str, ...]:
    return tuple(str(key.node.value) for key, _ in field.entries())


def _ports(field: Field) -> dict[Port, Port]:
    ports: dict[Port, Port] = {}
    for key, value in field.entries():
        service_port, target_port = key.parse(_parse_port), value.parse(_parse_port)
        if service_port is not None and target_port is not None:
            ports[Port(service_port)] = Port(target_port)
    return ports


def _port(field: Field) -> int | None:
    return field.parse(_parse_port)


def _gateway(field: Field) -> GatewayAddress | None:
    names = ("destination", "hboneMtlsPort")
    obj = field.object(frozenset(names), required=names)
    destination = obj.maybe("destination", _destination_field)
    port = obj.maybe("hboneMtlsPort", _port)
    if destination is None or port is None:
        return None
    return _the_one(GatewayAddress(destination, Port(port)))


def _destination_field(field: Field) -> NetworkAddress | NamespacedHostname | None:
    return field.parse(_destination)


def _weighted_waypoint(field: Field) -> WeightedWaypoint | None:
    names = ("destination", "weight")
    obj = field.object(frozenset(names), required=names)
    gateway = obj.maybe("destination", _gateway)
    weight = obj.read("weight", lambda item: item.parse(integer_up_to(CAPACITY_MAX)), 0)
    return None if gateway is None else WeightedWaypoint(gateway, weight)


def _load_balancer(field: Field) -> LoadBalancer:
    obj = field.object(frozenset({"routingPreferences", "mode", "healthPolicy"}))
    return LoadBalancer(
        obj.each("routingPreferences", lambda item: item.choice(Scope)),
        obj.choice("mode", BalanceMode, BalanceMode.STANDARD),
        obj.choice("healthPolicy", HealthPolicy, HealthPolicy.ONLY_HEALTHY),
    )


def _locality(field: Field) -> Locality:
    obj = field.object(frozenset({"region", "zone", "subzone"}))
    return _the_one(Locality(obj.text("region"), obj.text("zone"), obj.text("subzone")))


def _application_tunnel(field: Field) -> ApplicationTunnel:
    obj = field.object(frozenset({"protocol", "port"}))
    protocol = obj.choice("protocol", AppProtocol, AppProtocol.NONE)
    port = obj.maybe("port", _port)
    return ApplicationTunnel(protocol, Port(port) if port else None)


def _network_cidr(field: Field) -> NetworkCidr | None:
    """Read `{network, cidr}`, or `network/cidr` in one text."""
    if isinstance(field.node, yaml.ScalarNode):
        return field.parse(_network_cidr_text)
    obj = field.object(frozenset({"network", "cidr"}), required=("cidr",))
    cidr = obj.maybe("cidr", _cidr_field)
    return None if cidr is None else NetworkCidr(Network(obj.text("network")), cidr)


def _network_cidr_text(text: str) -> NetworkCidr:
    network, slash, cidr = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} is not network/cidr; write '/{text}' for the default network")
    return NetworkCidr(Network(network), _cidr(cidr))


def _network_address(text: str) -> NetworkAddress:
    network, slash, ip = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} is not network/IP; write '/{text}' for the default network")
    return NetworkAddress(Network(network), _ip(ip))


def _destination(text: str) -> NetworkAddress | NamespacedHostname:
    """Read `network/IP`, else `namespace/hostname`."""
    namespace, slash, hostname = text.partition("/")
    try:
        return NetworkAddress(Network(namespace), parse_ip(hostname))
    except ValueError:
        if not (slash and namespace and hostname):
            message = f"{text!r} is neither network/IP nor namespace/hostname"
            raise ValueError(message) from None
        return NamespacedHostname(Namespace(namespace), hostname)


def _ip(text: str) -> IpAddress:
    try:
        return parse_ip(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def _cidr(text: str) -> IpNetwork:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a CIDR; write 192.0.2.0/24 or 2001:db8::/32") from None


def _cidr_field(field: Field) -> IpNetwork | None:
    return field.parse(_cidr)


def _key(text: str) -> str:
    namespace, _, name = text.partition("/")
    if not (namespace and name):
        raise ValueError(f"{text!r} is not of the form namespace/name")
    return text


def _service_key(text: str) -> ServiceKey:
    return ServiceKey(_key(text))


def _policy_key(text: str) -> PolicyKey:
    return PolicyKey(_key(text))
