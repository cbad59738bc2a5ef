from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from tests.support.builders import (
    a_gateway,
    a_policy,
    a_service,
    a_store,
    a_vip,
    a_workload,
    an_account,
    exactly,
)
from ztunnel.errors import ResourceError
from ztunnel.model.network import Port
from ztunnel.model.policy import Action, Match, MatchKind, PolicyScope, StringMatch
from ztunnel.model.service import (
    BalanceMode,
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
from ztunnel.state.store import Store, Update
from ztunnel.xds.local import (
    endpoint_to_dict,
    parse_local_config,
    policy_to_dict,
    service_to_dict,
    static_workload_to_dict,
    workload_to_dict,
)

EXAMPLE = """\
workloads:
  - uid: lab//Pod/shop/cart-0
    name: cart-0
    namespace: shop
    serviceAccount: cart
    trustDomain: cluster.local
    clusterId: lab
    node: node-a
    workloadIps: ["192.0.2.10", "2001:db8::10"]
    protocol: HBONE
    authorizationPolicies: ["shop/only-frontend"]
    services:
      "shop/cart.shop.svc.cluster.local": {80: 8080, 9090: 9090}
services:
  - name: cart
    namespace: shop
    hostname: cart.shop.svc.cluster.local
    vips: ["/198.51.100.7"]
    ports: {80: 8080, 9090: 0}
    canonical: true
    loadBalancer: {routingPreferences: [Network, Region, Zone], mode: Failover,
                   healthPolicy: OnlyHealthy}
policies:
  - name: only-frontend
    namespace: shop
    scope: WorkloadSelector
    action: Allow
    dryRun: false
    rules:
      - - - serviceAccounts: [{namespace: shop, serviceAccount: frontend}]
            destinationPorts: [8080]
"""


def parse(text: str) -> Update:
    return parse_local_config(text, source="lab.yaml")


def test_the_example_of_the_specification() -> None:
    expected = Update(
        workloads=(
            a_workload(
                "cart-0",
                sa="cart",
                cluster_id="lab",
                node="node-a",
                ips=["192.0.2.10", "2001:db8::10"],
                protocol=TunnelProtocol.HBONE,
                policies=["shop/only-frontend"],
                services={"shop/cart.shop.svc.cluster.local": {80: 8080, 9090: 9090}},
            ),
        ),
        services=(
            a_service(
                vips=["/198.51.100.7"],
                port_map={80: 8080, 9090: 0},
                canonical=True,
                load_balancer=LoadBalancer(
                    (Scope.NETWORK, Scope.REGION, Scope.ZONE), BalanceMode.FAILOVER
                ),
            ),
        ),
        policies=(
            a_policy(
                match=Match(
                    service_accounts=(an_account("shop/frontend"),), destination_ports=(8080,)
                )
            ),
        ),
        replace_all=True,
    )
    assert parse(EXAMPLE) == expected


def test_json_is_read_too() -> None:
    assert parse(json.dumps(yaml.safe_load(EXAMPLE))) == parse(EXAMPLE)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "workloads:\n", "workloads: []"])
def test_an_empty_file_is_an_empty_state(text: str) -> None:
    assert parse(text) in (Update(replace_all=True), Update(replace_all=True, workloads=()))


def problems_of(text: str) -> list[str]:
    with pytest.raises(ResourceError) as caught:
        parse(text)
    return str(caught.value).split("\n")


PORT_PATH = "workloads[0].services.shop/cart.shop.svc.cluster.local.9090"
MEND_VIP = "'198.51.100.8' is not network/IP; write '/198.51.100.8' for the default network"


def test_all_mistakes_are_told_at_once_each_with_its_line() -> None:
    text = EXAMPLE.replace('["/198.51.100.7"]', '["/198.51.100.7", "198.51.100.8"]')
    text = text.replace("node: node-a", "nodeName: node-a").replace(
        "action: Allow", "action: allow"
    )
    text = text.replace("9090: 9090", "9090: 70000")
    assert problems_of(text) == [
        "lab.yaml: workloads[0], line 8: unknown key `nodeName`; did you mean `node`?",
        f"lab.yaml: {PORT_PATH}, line 13: '70000' is over 65535",
        f"lab.yaml: services[0].vips[1], line 18: {MEND_VIP}",
        "lab.yaml: policies[0].action, line 27: 'allow' is not known; use one of Allow, Deny",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("workload: []", "lab.yaml: document, line 1: unknown key `workload`; did you mean"),
        ("a: [}", "lab.yaml, line 1: not YAML: "),
        ("a: 1\nb: ]\n", "lab.yaml, line 2: not YAML: "),
        ("- 1", "lab.yaml: document, line 1: expected a map, found a list"),
        ("a: 1\n---\nb: 2\n", "lab.yaml, line 2: not YAML: "),
        ("\x00", "lab.yaml: not YAML: "),
        ("a: *nowhere", "lab.yaml, line 1: not YAML: "),
    ],
)
def test_what_is_no_configuration_at_all(text: str, problem: str) -> None:
    assert problems_of(text)[0].startswith(problem)


def test_two_of_one_key_are_a_mistake() -> None:
    workload = "{uid: u, namespace: n, workloadIps: [], services: {}}"
    policy = "{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: []}"
    text = f"workloads:\n- {workload}\n- {workload}\npolicies: [{policy}, {policy}]"
    assert problems_of(text) == [
        "lab.yaml: workloads[1], line 3: u is defined twice; keep one",
        "lab.yaml: policies[1], line 4: n/p is defined twice; keep one",
    ]


def test_a_missing_field_of_a_policy_is_not_guessed() -> None:
    text = "policies: [{name: p, namespace: n, scope: Global, action: Allow, rules: []}]"
    assert problems_of(text) == ["lab.yaml: policies[0], line 1: `dryRun` is missing"]


@given(
    text=st.text(alphabet=st.sampled_from("ab:[]{}-!&* \n'\"#|>%@\t0~"), max_size=60) | st.text()
)
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    message = "lab.yaml"
    try:
        parse(text)
    except ResourceError as exc:
        message = str(exc)
    assert message.startswith("lab.yaml")


@pytest.mark.parametrize("nest", ["[" * 100_000, "[" * 40 + "]" * 40])
def test_deep_nesting_is_refused(nest: str) -> None:
    assert problems_of("a:\n  " + nest) == ["lab.yaml, line 2: nested over 32 deep"]


FULL_WORKLOAD = a_workload(
    "cart-0",
    ips=["192.0.2.10", "2001:db8::10"],
    network="n",
    services={"shop/cart.shop.svc.cluster.local": {80: 8080}},
    policies=["shop/p"],
    hostname="h.example.com",
    protocol=TunnelProtocol.HBONE,
    network_mode=NetworkMode.HOST_NETWORK,
    native_tunnel=True,
    application_tunnel=ApplicationTunnel(AppProtocol.PROXY, Port(15088)),
    waypoint=a_gateway("shop/wp.example.com"),
    network_gateway=a_gateway("far/192.0.2.1"),
    workload_name="cart",
    workload_type="pod",
    canonical_name="cart",
    canonical_revision="v1",
    node="node-a",
    cluster_id="lab",
    locality=Locality("r", "z", ""),
    health=Health.UNHEALTHY,
    capacity=0,
)
FULL_SERVICE = a_service(
    vips=["n/10.0.0.1", "/2001:db8::1"],
    cidrs=["10.1.0.0/16"],
    subject_alt_names=("spiffe://td/ns/a/sa/b",),
    waypoint=a_gateway("/192.0.2.1"),
    weighted_waypoints=(WeightedWaypoint(a_gateway("shop/wp"), 3),),
    load_balancer=LoadBalancer((Scope.ZONE,), BalanceMode.STRICT),
    ip_families=IpFamilies.DUAL,
    canonical=True,
    visibility=Visibility.NAMESPACE,
)
PRESENCE = StringMatch(MatchKind.PRESENCE)
FULL_POLICY = a_policy(
    action=Action.DENY,
    scope=PolicyScope.GLOBAL,
    dry_run=True,
    rules=(
        (),
        ((),),
        ((Match(),), (Match(namespaces=(exactly(""),), not_principals=(PRESENCE,)),)),
        ((Match(service_accounts=(an_account("a/b"),), not_destination_ports=(1, 2)),),),
    ),
)


def test_a_workload_as_the_config_dump_shows_it() -> None:
    assert workload_to_dict(FULL_WORKLOAD) == {
        "applicationTunnel": {"port": 15088, "protocol": "PROXY"},
        "authorizationPolicies": ["shop/p"],
        "canonicalName": "cart",
        "canonicalRevision": "v1",
        "capacity": 0,
        "clusterId": "lab",
        "hostname": "h.example.com",
        "locality": {"region": "r", "zone": "z"},
        "name": "cart-0",
        "namespace": "shop",
        "nativeTunnel": True,
        "network": "n",
        "networkGateway": {"destination": "far/192.0.2.1", "hboneMtlsPort": 15008},
        "networkMode": "HostNetwork",
        "node": "node-a",
        "protocol": "HBONE",
        "serviceAccount": "default",
        "services": ["shop/cart.shop.svc.cluster.local"],
        "status": "Unhealthy",
        "trustDomain": "cluster.local",
        "uid": "lab//Pod/shop/cart-0",
        "waypoint": {"destination": "shop/wp.example.com", "hboneMtlsPort": 15008},
        "workloadIps": ["192.0.2.10", "2001:db8::10"],
        "workloadName": "cart",
        "workloadType": "pod",
    }


def test_a_plain_workload_shows_only_what_is_always_there() -> None:
    plain = a_workload("a", uid="", ns="", sa="", ips=[])
    assert set(workload_to_dict(plain)) == {
        *("workloadIps", "protocol", "networkMode", "name", "namespace", "status", "clusterId"),
        *("capacity", "trustDomain"),
    }


def test_a_service_as_the_config_dump_shows_it() -> None:
    shown = service_to_dict(FULL_SERVICE)
    assert shown["vips"] == ["n/10.0.0.1", "/2001:db8::1"]
    assert shown["ports"] == {"80": 8080}
    assert shown["cidrVips"] == [{"network": "", "cidr": "10.1.0.0/16"}]
    assert shown["ipFamilies"] == "Dual"
    assert shown["loadBalancer"] == {
        "routingPreferences": ["Zone"],
        "mode": "Strict",
        "healthPolicy": "OnlyHealthy",
    }
    assert shown["weightedWaypoints"] == [
        {"destination": {"destination": "shop/wp", "hboneMtlsPort": 15008}, "weight": 3}
    ]


def test_a_plain_service_shows_only_what_is_always_there() -> None:
    assert set(service_to_dict(a_service())) == {
        *("name", "namespace", "hostname", "vips", "ports", "subjectAltNames"),
        *("canonical", "visibility"),
    }


def test_an_endpoint_as_the_config_dump_shows_it() -> None:
    assert endpoint_to_dict(FULL_WORKLOAD, FULL_SERVICE.key) == {
        "port": {"80": 8080},
        "status": "Unhealthy",
        "workloadUid": FULL_WORKLOAD.uid,
    }


def test_an_endpoint_of_a_service_it_does_not_serve_has_no_ports() -> None:
    assert endpoint_to_dict(a_workload(), a_service().key)["port"] == {}


def test_a_policy_as_the_config_dump_shows_it() -> None:
    assert policy_to_dict(FULL_POLICY) == {
        "action": "Deny",
        "dryRun": True,
        "name": "only-frontend",
        "namespace": "shop",
        "rules": [
            [],
            [[]],
            [[{}], [{"namespaces": [{"Exact": ""}], "notPrincipals": [{"Presence": []}]}]],
            [
                [
                    {
                        "notDestinationPorts": [1, 2],
                        "serviceAccounts": [{"namespace": "a", "serviceAccount": "b"}],
                    }
                ]
            ],
        ],
        "scope": "Global",
    }


def reread(store: Store) -> Store:
    again = Store()
    shown = {
        "workloads": [static_workload_to_dict(one) for one in store.workloads.all()],
        "services": [service_to_dict(one) for one in store.services.all()],
        "policies": [policy_to_dict(one) for one in store.policies.all()],
    }
    again.apply(parse(json.dumps(shown)))
    return again


def contents(store: Store) -> dict[str, Any]:
    return {
        "workloads": {w.uid: w for w in store.workloads.all()},
        "services": {s.key: s for s in store.services.all()},
        "policies": {p.key: p for p in store.policies.all()},
    }


def test_what_is_dumped_can_be_read_again() -> None:
    store = a_store(FULL_WORKLOAD, FULL_SERVICE, FULL_POLICY, a_workload("b"), a_service("other"))
    assert contents(reread(store)) == contents(store)


texts = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=8)
keys = st.sampled_from(["shop/cart", "bank/db.example.com"])


@given(
    name=texts.filter(bool),
    node=texts,
    port_map=st.dictionaries(st.integers(0, 65535), st.integers(0, 65535), max_size=2),
    key=keys,
    match_text=texts,
    kind=st.sampled_from(MatchKind),
)
def test_whatever_is_dumped_can_be_read_again(
    name: str,
    node: str,
    port_map: dict[int, int],
    key: str,
    match_text: str,
    kind: MatchKind,
) -> None:
    match = StringMatch(kind, "" if kind is MatchKind.PRESENCE else match_text)
    store = a_store(
        a_workload(name, node=node, services={key: port_map}),
        a_service("h", vips=[str(a_vip("/10.0.0.1"))], port_map=port_map),
        a_policy(name, match=Match(principals=(match,))),
    )
    assert contents(reread(store)) == contents(store)
