from __future__ import annotations

from ipaddress import ip_network

import pytest
import yaml
from hypothesis import given, strategies as st

from tests.support.builders import NOBODY, a_flow, an_account, an_identity, exactly
from ztunnel.decide.authorize import Permit, authorize
from ztunnel.devmesh.kubernetes_policies import (
    ROOT_NAMESPACE,
    STATIC_STRICT_KEY,
    PeerAuthentication,
    authorization_policy,
    mutual_tls_policies,
    static_strict,
    string_match,
)
from ztunnel.errors import ResourceError
from ztunnel.model.policy import Action, Match, MatchKind, Policy, PolicyScope, StringMatch
from ztunnel.state.policies import PolicySet


def convert(text: str, namespace: str = "shop") -> Policy | None:
    return authorization_policy("p", namespace, yaml.safe_load(text))


def rules_of(text: str) -> tuple[object, ...]:
    policy = convert(text)
    assert policy is not None
    return policy.rules


def test_sources_operations_and_conditions_become_clauses() -> None:
    [rule] = rules_of("""
        spec:
          rules:
          - from:
            - source: {principals: [cluster.local/ns/shop/sa/web], notNamespaces: [evil]}
            - source: {serviceAccounts: [bank/vault, web], ipBlocks: [10.0.0.0/8, 192.0.2.1]}
            to:
            - operation: {ports: ["8080"], notPorts: ["9090"]}
            when:
            - {key: source.ip, notValues: [10.1.0.0/16]}
            - {key: destination.port, values: [80]}
    """)
    assert rule == (
        (
            Match(
                principals=(exactly("cluster.local/ns/shop/sa/web"),),
                not_namespaces=(exactly("evil"),),
            ),
            Match(
                service_accounts=(an_account("bank/vault"), an_account("shop/web")),
                source_ips=(ip_network("10.0.0.0/8"), ip_network("192.0.2.1/32")),
            ),
        ),
        (Match(destination_ports=(8080,), not_destination_ports=(9090,)),),
        (Match(not_source_ips=(ip_network("10.1.0.0/16"),)),),
        (Match(destination_ports=(80,)),),
    )


@pytest.mark.parametrize(
    ("text", "kind", "rest"),
    [
        ("*", MatchKind.PRESENCE, ""),
        ("shop-*", MatchKind.PREFIX, "shop-"),
        ("*/sa/web", MatchKind.SUFFIX, "/sa/web"),
        ("shop", MatchKind.EXACT, "shop"),
    ],
)
def test_stars(text: str, kind: MatchKind, rest: str) -> None:
    assert string_match(text) == StringMatch(kind, rest)


@pytest.mark.parametrize(
    ("spec", "namespace", "scope"),
    [
        ("spec: {}", "shop", PolicyScope.NAMESPACE),
        ("spec: {}", ROOT_NAMESPACE, PolicyScope.GLOBAL),
        ("spec: {selector: {matchLabels: {app: a}}}", "shop", PolicyScope.WORKLOAD_SELECTOR),
        (
            "spec: {selector: {matchLabels: {app: a}}}",
            ROOT_NAMESPACE,
            PolicyScope.WORKLOAD_SELECTOR,
        ),
    ],
)
def test_whom_a_policy_is_about(spec: str, namespace: str, scope: PolicyScope) -> None:
    policy = convert(spec, namespace)
    assert policy is not None
    assert policy.scope is scope


@pytest.mark.parametrize(
    "spec",
    [
        "spec: {action: CUSTOM}",
        "spec: {action: AUDIT}",
        "spec: {targetRefs: [{kind: Gateway, name: waypoint}]}",
    ],
)
def test_what_is_not_for_node_proxies_is_not_sent(spec: str) -> None:
    assert convert(spec) is None


def test_no_rules_allow_nothing_and_an_empty_rule_allows_everything() -> None:
    assert rules_of("spec: {}") == ()
    assert rules_of("spec: {rules: [{}]}") == ((),)


HTTP = (
    "rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]},"
    " {to: [{operation: {paths: [/]}}]}]"
)


def test_an_allow_rule_that_needs_requests_becomes_nothing() -> None:
    assert rules_of(f"spec: {{{HTTP}}}") == ()


def test_a_deny_rule_that_needs_requests_keeps_the_rest() -> None:
    assert rules_of(f"spec: {{action: DENY, {HTTP}}}") == (
        ((Match(destination_ports=(80,)),),),
        ((Match(),),),  # an empty match, which matches nothing
    )


def test_a_dry_run_is_marked() -> None:
    policy = convert("metadata: {annotations: {istio.io/dry-run: 'true'}}\nspec: {action: DENY}")
    assert policy is not None
    assert policy.dry_run
    assert policy.action is Action.DENY


@pytest.mark.parametrize(
    "spec",
    [
        "spec: []",
        "spec: {rules: {}}",
        "spec: {rules: [{from: [{source: {ipBlocks: [x]}}]}]}",
        "spec: {rules: [{to: [{operation: {ports: [http]}}]}]}",
    ],
)
def test_what_is_malformed_is_refused(spec: str) -> None:
    with pytest.raises(ResourceError):
        convert(spec)


def a_peer(mode: str, *, ns: str = "shop", spec: str = "") -> PeerAuthentication:
    text = f"{{mtls: {{mode: {mode}}}{', ' + spec if spec else ''}}}"
    return PeerAuthentication.read("pa", ns, yaml.safe_load(text))


SELECTS = "selector: {matchLabels: {app: cart}}"


@pytest.mark.parametrize(
    ("peers", "is_strict"),
    [
        pytest.param([], False, id="nothing said"),
        pytest.param([a_peer("STRICT")], True, id="its namespace"),
        pytest.param([a_peer("STRICT", ns=ROOT_NAMESPACE)], True, id="the mesh"),
        pytest.param([a_peer("STRICT", ns="bank")], False, id="another namespace"),
        pytest.param(
            [a_peer("STRICT", ns=ROOT_NAMESPACE), a_peer("PERMISSIVE")],
            False,
            id="the namespace beats the mesh",
        ),
        pytest.param(
            [a_peer("STRICT"), a_peer("DISABLE", spec=SELECTS)], False, id="the workload beats both"
        ),
        pytest.param([a_peer("STRICT"), a_peer("UNSET", spec=SELECTS)], True, id="unset inherits"),
        pytest.param(
            [a_peer("STRICT", spec="selector: {matchLabels: {app: other}}")],
            False,
            id="another workload",
        ),
    ],
)
def test_who_must_use_mutual_tls(peers: list[PeerAuthentication], is_strict: bool) -> None:
    keys, made = mutual_tls_policies("shop", {"app": "cart"}, peers)
    assert keys == ([STATIC_STRICT_KEY] if is_strict else [])
    assert made == []


def permits(policy: Policy, *, port: int, anonymous: bool) -> bool:
    flow = a_flow(by=NOBODY if anonymous else an_identity(), destination=f"192.0.2.10:{port}")
    return isinstance(authorize(flow, PolicySet.of([policy])), Permit)


def test_strict_refuses_plaintext_only() -> None:
    assert permits(static_strict(), port=80, anonymous=False)
    assert not permits(static_strict(), port=80, anonymous=True)


@given(port=st.sampled_from([80, 8080]), anonymous=st.booleans())
def test_ports_may_be_excepted_from_either_mode(port: int, anonymous: bool) -> None:
    for mode, excepted in (("STRICT", "PERMISSIVE"), ("PERMISSIVE", "STRICT")):
        spec = f"{SELECTS}, portLevelMtls: {{'8080': {{mode: {excepted}}}}}"
        keys, [policy] = mutual_tls_policies("shop", {"app": "cart"}, [a_peer(mode, spec=spec)])
        assert keys == [policy.key] == ["shop/converted_peer_authentication_pa"]
        is_strict_there = (mode if port == 80 else excepted) == "STRICT"
        assert permits(policy, port=port, anonymous=anonymous) is not (
            is_strict_there and anonymous
        )
