from __future__ import annotations

from ipaddress import ip_network
from typing import TypeVar

import pytest
import yaml

from tests.support.builders import (
    a_cidr_vip,
    a_gateway,
    a_service,
    a_vip,
    a_workload,
    an_account,
    exactly,
)
from ztunnel.model.network import Port, parse_ip
from ztunnel.model.policy import Action, Match, MatchKind, PolicyScope, StringMatch
from ztunnel.model.service import (
    BalanceMode,
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Scope,
    Visibility,
    WeightedWaypoint,
)
from ztunnel.model.workload import (
    ApplicationTunnel,
    AppProtocol,
    Health,
    Locality,
    NetworkMode,
    TunnelProtocol,
)
from ztunnel.xds.fields import Field, Problems
from ztunnel.xds.local_objects import read_policy, read_service, read_workload

T = TypeVar("T")
MINIMAL_WORKLOAD = "name: a, namespace: shop, workloadIps: [], services: {}"
MINIMAL_SERVICE = "name: cart, namespace: shop, hostname: cart.shop, vips: [], ports: {}"
MINIMAL_POLICY = "name: p, namespace: shop, scope: Namespace, action: Deny, dryRun: false"


def field_of(text: str) -> Field:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None
    return Field(node, "x", Problems("lab.yaml"))


def good(value: T, field: Field) -> T:
    assert str(field.problems) == ""
    return value


def workload_of(more: str) -> object:
    field = field_of("{" + MINIMAL_WORKLOAD + ", " + more + "}")
    return good(read_workload(field), field)


def service_of(more: str) -> object:
    field = field_of("{" + MINIMAL_SERVICE + ", " + more + "}")
    return good(read_service(field), field)


def match_of(text: str) -> Match:
    field = field_of("{" + MINIMAL_POLICY + ", rules: [[[" + text + "]]]}")
    policy = good(read_policy(field), field)
    ((match,),) = policy.rules[0]
    return match


def test_a_minimal_workload_gets_the_uid_a_control_plane_would_make() -> None:
    field = field_of("{" + MINIMAL_WORKLOAD + ", clusterId: lab}")
    workload = good(read_workload(field), field)
    assert workload.uid == "lab//Pod/shop/a"
    assert workload.capacity == 1
    assert (workload.trust_domain, workload.service_account) == ("", "")


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("uid: u", "uid", "u"),
        ("trustDomain: td", "trust_domain", "td"),
        ("serviceAccount: sa", "service_account", "sa"),
        ("network: n", "network", "n"),
        ("node: n", "node", "n"),
        ("hostname: h.example.com", "hostname", "h.example.com"),
        ("workloadName: w", "workload_name", "w"),
        ("workloadType: pod", "workload_type", "pod"),
        ("canonicalName: c", "canonical_name", "c"),
        ("canonicalRevision: 1", "canonical_revision", "1"),
        ("protocol: HBONE", "protocol", TunnelProtocol.HBONE),
        ("networkMode: HostNetwork", "network_mode", NetworkMode.HOST_NETWORK),
        ("status: Unhealthy", "health", Health.UNHEALTHY),
        ("nativeTunnel: true", "native_tunnel", True),
        (
            "applicationTunnel: {protocol: PROXY, port: 15088}",
            "application_tunnel",
            ApplicationTunnel(AppProtocol.PROXY, Port(15088)),
        ),
        (
            "applicationTunnel: {protocol: NONE, port: ~}",
            "application_tunnel",
            ApplicationTunnel(AppProtocol.NONE, None),
        ),
        (
            "applicationTunnel: {protocol: NONE, port: 0}",
            "application_tunnel",
            ApplicationTunnel(AppProtocol.NONE, None),
        ),
        (
            "waypoint: {destination: /192.0.2.1, hboneMtlsPort: 15008}",
            "waypoint",
            a_gateway("/192.0.2.1"),
        ),
        (
            "networkGateway: {destination: 'far/2001:db8::1', hboneMtlsPort: 1}",
            "network_gateway",
            a_gateway("far/2001:db8::1", 1),
        ),
        (
            "waypoint: {destination: shop/wp.example.com, hboneMtlsPort: 15008}",
            "waypoint",
            a_gateway("shop/wp.example.com"),
        ),
        ("authorizationPolicies: [shop/p]", "policies", ("shop/p",)),
        ("locality: {region: r, zone: z, subzone: s}", "locality", Locality("r", "z", "s")),
        ("capacity: 0", "capacity", 0),
        ("capacity: 4294967295", "capacity", 4294967295),
    ],
)
def test_each_field_of_a_workload(text: str, attribute: str, value: object) -> None:
    assert getattr(workload_of(text), attribute) == value


def test_addresses_and_services_of_a_workload() -> None:
    field = field_of(
        "{namespace: shop, name: cart-0, workloadIps: [192.0.2.10, '::ffff:192.0.2.11'],"
        " services: {shop/cart: {80: 8080, '90': 0}}}"
    )
    workload = good(read_workload(field), field)
    assert workload.ips == (parse_ip("192.0.2.10"), parse_ip("192.0.2.11"))
    assert workload.services == a_workload(services={"shop/cart": {80: 8080, 90: 0}}).services


def test_services_may_be_a_mere_list_as_the_config_dump_writes_them() -> None:
    field = field_of("{namespace: shop, name: a, workloadIps: [], services: [shop/cart, nonsense]}")
    workload = read_workload(field)
    assert workload.services == {"shop/cart": {}}
    assert "x.services[1], line 1: 'nonsense' is not of the form" in str(field.problems)


def test_a_service_without_namespace_cannot_be_served() -> None:
    field = field_of("{namespace: shop, name: a, workloadIps: [], services: {cart: {80: 80}}}")
    assert read_workload(field).services == {}
    assert "x.services, line 1: 'cart' is not of the form" in str(field.problems)


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("subjectAltNames: [spiffe://a]", "subject_alt_names", ("spiffe://a",)),
        ("canonical: true", "canonical", True),
        ("visibility: Namespace", "visibility", Visibility.NAMESPACE),
        ("ipFamilies: IPv6", "ip_families", IpFamilies.IPV6_ONLY),
        ("ipFamilies: ~", "ip_families", None),
        (
            "cidrVips: [{network: n, cidr: 10.0.0.0/8}]",
            "cidr_vips",
            (a_cidr_vip("10.0.0.0/8", "n"),),
        ),
        ("cidrVips: [n/10.0.0.0/8]", "cidr_vips", (a_cidr_vip("10.0.0.0/8", "n"),)),
        ("cidrVips: [{cidr: 10.9.9.9/8}]", "cidr_vips", (a_cidr_vip("10.0.0.0/8"),)),
        (
            "weightedWaypoints: [{weight: 3, destination: {destination: /::1, hboneMtlsPort: 1}}]",
            "weighted_waypoints",
            (WeightedWaypoint(a_gateway("/::1", 1), 3),),
        ),
        (
            "loadBalancer: {routingPreferences: [Network], mode: Strict, healthPolicy: AllowAll}",
            "load_balancer",
            LoadBalancer((Scope.NETWORK,), BalanceMode.STRICT, HealthPolicy.ALLOW_ALL),
        ),
        ("loadBalancer: {}", "load_balancer", LoadBalancer()),
        ("endpoints: {u: {workloadUid: u, port: {80: 80}, status: Healthy}}", "ports", {}),
    ],
)
def test_each_field_of_a_service(text: str, attribute: str, value: object) -> None:
    assert getattr(service_of(text), attribute) == value


def test_vips_and_ports_of_a_service() -> None:
    field = field_of(
        "{name: cart, namespace: shop, hostname: cart.shop, vips: [/10.0.0.1, 'n/2001:db8::1'],"
        " ports: {80: 8080}}"
    )
    service = good(read_service(field), field)
    assert service.vips == (a_vip("/10.0.0.1"), a_vip("n/2001:db8::1"))
    assert service.ports == a_service().ports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Match()),
        ("{namespaces: [!Exact shop]}", Match(namespaces=(exactly("shop"),))),
        ("{namespaces: [{Exact: shop}]}", Match(namespaces=(exactly("shop"),))),
        ("{namespaces: [!Exact '']}", Match(namespaces=(exactly(""),))),
        (
            "{principals: [!Prefix a, {Suffix: b}]}",
            Match(
                principals=(StringMatch(MatchKind.PREFIX, "a"), StringMatch(MatchKind.SUFFIX, "b"))
            ),
        ),
        (
            "{notPrincipals: [!Presence [], {Presence: []}, !Presence '']}",
            Match(not_principals=(StringMatch(MatchKind.PRESENCE),) * 3),
        ),
        ("{notNamespaces: [!Exact a]}", Match(not_namespaces=(exactly("a"),))),
        (
            "{serviceAccounts: [{namespace: a, serviceAccount: b}]}",
            Match(service_accounts=(an_account("a/b"),)),
        ),
        (
            "{notServiceAccounts: [{namespace: a, serviceAccount: b}]}",
            Match(not_service_accounts=(an_account("a/b"),)),
        ),
        (
            "{sourceIps: [10.0.0.0/8], notSourceIps: [10.1.0.0/16]}",
            Match(
                source_ips=(ip_network("10.0.0.0/8"),), not_source_ips=(ip_network("10.1.0.0/16"),)
            ),
        ),
        (
            "{destinationIps: ['::/0'], notDestinationIps: [10.0.0.1]}",
            Match(
                destination_ips=(ip_network("::/0"),),
                not_destination_ips=(ip_network("10.0.0.1"),),
            ),
        ),
        (
            "{destinationPorts: [80], notDestinationPorts: [81, 82]}",
            Match(destination_ports=(80,), not_destination_ports=(81, 82)),
        ),
    ],
)
def test_each_field_of_a_match(text: str, expected: Match) -> None:
    assert match_of(text) == expected


def test_a_policy() -> None:
    field = field_of(
        "{name: p, namespace: shop, scope: WorkloadSelector, action: Allow, dryRun: true,"
        " rules: [[], [[]]]}"
    )
    policy = good(read_policy(field), field)
    assert policy.key == "shop/p"
    assert (policy.scope, policy.action) == (PolicyScope.WORKLOAD_SELECTOR, Action.ALLOW)
    assert policy.dry_run
    assert policy.rules == ((), ((),))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vips: [10.0.0.1]", "'10.0.0.1' is not network/IP; write '/10.0.0.1' for the default"),
        ("vips: [/10.0.0]", "'10.0.0' is not an IP address"),
        ("cidrVips: [{cidr: 10.0.0.0/33}]", "'10.0.0.0/33' is not a CIDR"),
        ("cidrVips: [nothing]", "'nothing' is not network/cidr"),
        ("ports: {80: eighty}", "x.ports.80, line 1: 'eighty' is not a number"),
        ("ports: {http: 80}", "x.ports, line 1: 'http' is not a number"),
        ("waypoint: {destination: nowhere, hboneMtlsPort: 1}", "neither network/IP nor"),
        ("waypoint: {destination: a/b}", "x.waypoint, line 1: `hboneMtlsPort` is missing"),
        ("loadBalancer: {mode: Best}", "'Best' is not known; use one of Standard, Strict"),
        ("weightedWaypoints: [{weight: 1}]", "weightedWaypoints[0], line 1: `destination` is"),
        ("port: {}", "unknown key `port`; did you mean `ports`?"),
    ],
)
def test_mistakes_in_a_service(text: str, problem: str) -> None:
    base = "name: cart, namespace: shop, hostname: cart.shop"
    empty = {"vips": "vips: []", "ports": "ports: {}"}
    empty.pop(text.partition(":")[0], None)
    field = field_of("{" + ", ".join([base, *empty.values(), text]) + "}")
    read_service(field)
    assert problem in str(field.problems)
    assert len(field.problems.lines) == 1


@pytest.mark.parametrize(
    ("match", "problem"),
    [
        ("{namespaces: [shop]}", "write one of !Exact, !Prefix, !Suffix or !Presence"),
        ("{namespaces: [!Regex a]}", "'Regex' is no way to match"),
        ("{namespaces: [{Exact: a, Prefix: b}]}", "write one of !Exact"),
        ("{namespaces: [{Exact: [a]}]}", "expected text, found a list"),
        ("{serviceAccounts: [{namespace: a}]}", "`serviceAccount` is missing"),
        ("{destinationPorts: [65536]}", "'65536' is over 65535"),
    ],
)
def test_mistakes_in_a_match(match: str, problem: str) -> None:
    field = field_of("{" + MINIMAL_POLICY + ", rules: [[[" + match + "]]]}")
    read_policy(field)
    assert problem in str(field.problems)


def test_a_workload_needs_something_to_be_known_by() -> None:
    field = field_of("{namespace: shop, workloadIps: [], services: {}}")
    read_workload(field)
    assert "needs a `uid`, or a `name`" in str(field.problems)


def test_what_equals_is_there_once() -> None:
    text = """{name: %s, namespace: shop, workloadIps: [], node: node-a, locality: {region: eu},
        authorizationPolicies: [shop/p], waypoint: {destination: shop/w.test, hboneMtlsPort: 15008},
        services: {shop/cart.test: {80: 8080}}}"""
    one, other = (read_workload(field_of(text % name)) for name in ("a", "b"))
    assert one.uid != other.uid
    for name in ("namespace", "node", "locality", "policies", "waypoint", "services"):
        assert getattr(one, name) is getattr(other, name), name
