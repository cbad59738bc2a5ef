"""The static configuration: a text that stands in for a control plane (state-and-xds.md 14).

The same object shapes are used in the config dump, so their serializers are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import yaml

from ztunnel.errors import ResourceError
from ztunnel.model.network import Port
from ztunnel.model.policy import Match, MatchKind, Policy, ServiceAccountMatch, StringMatch
from ztunnel.model.service import Service
from ztunnel.model.workload import GatewayAddress, Locality, ServiceKey, Workload
from ztunnel.state.store import Update
from ztunnel.xds.document import compose, finish
from ztunnel.xds.fields import Field, Problems
from ztunnel.xds.local_objects import read_policy, read_service, read_workload

Json: TypeAlias = "str | int | bool | list[Json] | dict[str, Json] | None"
T = TypeVar("T")


def parse_local_config(text: str, *, source: str) -> Update:
    """Read YAML, or JSON as its subset; the update replaces everything known before.

    `source` names the text in messages, usually its path.

    Raises:
        ResourceError: one line for each mistake (up to 20): where it is and how to mend it.
    """
    return finish(parse_in_steps(text, source=source))


def parse_in_steps(text: str, *, source: str) -> Generator[None, None, Update]:
    """Do what `parse_local_config` does, with rests.

    Raises:
        ResourceError: as there.
    """
    problems = Problems(source)
    workloads = _List("workloads", problems, read_workload, lambda workload: workload.uid)
    services = _List("services", problems, read_service, lambda service: service.key)
    policies = _List("policies", problems, read_policy, lambda policy: policy.key)
    lists = {each.name: each for each in (workloads, services, policies)}

    def take(key: yaml.Node, element: yaml.Node) -> None:
        # A key that is no text, or not known, is a mistake that the root tells.
        if isinstance(key, yaml.ScalarNode) and key.value in lists:
            lists[key.value].take(element)

    root = yield from compose(text, source=source, take=take)
    if root is not None:
        top = Field(root, "", problems).object(frozenset(lists))
        for name in lists:
            top.each(name, Field.text)  # a list is empty by now; anything else is a mistake
    if problems.lines:
        raise ResourceError(str(problems))
    return Update(
        workloads=tuple(workloads.found),
        services=tuple(services.found),
        policies=tuple(policies.found),
        replace_all=True,
    )


@dataclass(slots=True)
class _List(Generic[T]):
    """What has been read of one list; a second thing of the same key would silently win."""

    name: str
    problems: Problems
    read: Callable[[Field], T]
    key_of: Callable[[T], Hashable]
    found: list[T] = field(default_factory=list)
    seen: set[Hashable] = field(default_factory=set)

    def take(self, element: yaml.Node) -> None:
        """Read the next element."""
        item = Field(element, f"{self.name}[{len(self.found)}]", self.problems)
        value = self.read(item)
        key = self.key_of(value)
        if key in self.seen:
            item.wrong(f"{key} is defined twice; keep one")
        self.seen.add(key)
        self.found.append(value)


def static_workload_to_dict(workload: Workload) -> dict[str, Json]:
    """Return a workload in the form `parse_local_config` reads: with the ports of its services."""
    return {
        **workload_to_dict(workload),
        "services": {key: _ports_to_dict(ports) for key, ports in workload.services.items()},
    }


def workload_to_dict(workload: Workload) -> dict[str, Json]:
    """Return a workload as the config dump shows it (dns-and-observability.md 4.1)."""
    tunnel = workload.application_tunnel
    optional: dict[str, Json] = {
        "uid": workload.uid,
        "trustDomain": workload.trust_domain,
        "serviceAccount": workload.service_account,
        "network": workload.network,
        "workloadName": workload.workload_name,
        "workloadType": workload.workload_type,
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "hostname": workload.hostname,
        "node": workload.node,
        "nativeTunnel": workload.native_tunnel,
        "authorizationPolicies": list(workload.policies),
        "locality": _locality_to_dict(workload.locality),
        "services": list(workload.services),
        "applicationTunnel": {"protocol": tunnel.protocol, "port": tunnel.port} if tunnel else None,
        "waypoint": _gateway_to_dict(workload.waypoint),
        "networkGateway": _gateway_to_dict(workload.network_gateway),
    }
    return {
        "workloadIps": [str(ip) for ip in workload.ips],
        "protocol": workload.protocol,
        "networkMode": workload.network_mode,
        "name": workload.name,
        "namespace": workload.namespace,
        "status": workload.health,
        "clusterId": workload.cluster_id,
        "capacity": workload.capacity,
        **_without_empty(optional),
    }


def service_to_dict(service: Service) -> dict[str, Json]:
    """Return a service as the config dump shows it, but for its `endpoints` (4.2)."""
    balancer = service.load_balancer
    optional: dict[str, Json] = {
        "cidrVips": [{"network": vip.network, "cidr": str(vip.cidr)} for vip in service.cidr_vips],
        "waypoint": _gateway_to_dict(service.waypoint),
        "weightedWaypoints": [
            {"destination": _gateway_to_dict(choice.destination), "weight": choice.weight}
            for choice in service.weighted_waypoints
        ],
        "loadBalancer": {
            "routingPreferences": list(balancer.routing_preferences),
            "mode": balancer.mode,
            "healthPolicy": balancer.health_policy,
        }
        if balancer
        else None,
        "ipFamilies": service.ip_families,
    }
    return {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": [str(vip) for vip in service.vips],
        "ports": _ports_to_dict(service.ports),
        "subjectAltNames": list(service.subject_alt_names),
        "canonical": service.canonical,
        "visibility": service.visibility,
        **_without_empty(optional),
    }


def endpoint_to_dict(workload: Workload, key: ServiceKey) -> dict[str, Json]:
    """Return one endpoint of the service `key`, as the config dump shows it (4.2)."""
    return {
        "workloadUid": workload.uid,
        "port": _ports_to_dict(workload.services.get(key, {})),
        "status": workload.health,
    }


def policy_to_dict(policy: Policy) -> dict[str, Json]:
    """Return a policy as the config dump shows it (4.3)."""
    return {
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": policy.scope,
        "action": policy.action,
        "dryRun": policy.dry_run,
        "rules": [
            [[_match_to_dict(match) for match in clause] for clause in rule]
            for rule in policy.rules
        ],
    }


def _match_to_dict(match: Match) -> dict[str, Json]:
    return _without_empty(
        {
            "namespaces": [_string_to_dict(m) for m in match.namespaces],
            "notNamespaces": [_string_to_dict(m) for m in match.not_namespaces],
            "principals": [_string_to_dict(m) for m in match.principals],
            "notPrincipals": [_string_to_dict(m) for m in match.not_principals],
            "serviceAccounts": [_account_to_dict(m) for m in match.service_accounts],
            "notServiceAccounts": [_account_to_dict(m) for m in match.not_service_accounts],
            "sourceIps": [str(cidr) for cidr in match.source_ips],
            "notSourceIps": [str(cidr) for cidr in match.not_source_ips],
            "destinationIps": [str(cidr) for cidr in match.destination_ips],
            "notDestinationIps": [str(cidr) for cidr in match.not_destination_ips],
            "destinationPorts": list(match.destination_ports),
            "notDestinationPorts": list(match.not_destination_ports),
        }
    )


def _string_to_dict(match: StringMatch) -> dict[str, Json]:
    return {match.kind: [] if match.kind is MatchKind.PRESENCE else match.text}


def _account_to_dict(match: ServiceAccountMatch) -> dict[str, Json]:
    return {"namespace": match.namespace, "serviceAccount": match.service_account}


def _gateway_to_dict(gateway: GatewayAddress | None) -> dict[str, Json] | None:
    if gateway is None:
        return None
    return {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_mtls_port}


def _locality_to_dict(locality: Locality) -> dict[str, Json]:
    return _without_empty(
        {"region": locality.region, "zone": locality.zone, "subzone": locality.subzone}
    )


def _ports_to_dict(ports: Mapping[Port, Port]) -> dict[str, Json]:
    return {str(port): target for port, target in ports.items()}


def _without_empty(fields: dict[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in fields.items() if value}
