from __future__ import annotations

import copy
import dataclasses
from ipaddress import ip_network

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import (
    NOBODY,
    a_flow,
    a_policy,
    a_store,
    a_workload,
    allow,
    an_account,
    an_identity,
    deny,
    exactly,
)
from ztunnel.decide.authorize import Permit, Refusal, authorize, authorize_outbound, permit_again
from ztunnel.decide.classify import illegal_ports
from ztunnel.model.flow import Flow
from ztunnel.model.network import Endpoint, IpNetwork
from ztunnel.model.policy import Action, Match, MatchKind, Policy, PolicyScope, StringMatch

FROM_FRONTEND = a_flow()
PRINCIPAL = "cluster.local/ns/shop/sa/frontend"


def is_permitted(flow: Flow, *policies: Policy) -> bool:
    return isinstance(authorize(flow, policies), Permit)


@pytest.mark.parametrize(
    ("policies", "reason"),
    [
        pytest.param([], None, id="no policies"),
        pytest.param([allow("shop/frontend")], None, id="an ALLOW about us"),
        pytest.param(
            [allow("bank/teller")],
            "allow policies exist, but none allowed",
            id="an ALLOW about someone else",
        ),
        pytest.param(
            [allow("shop/frontend"), deny("shop/frontend", name="stop")],
            "explicitly denied by: shop/stop",
            id="DENY beats ALLOW",
        ),
        pytest.param([deny("bank/teller")], None, id="a DENY about someone else"),
        pytest.param(
            [a_policy("nothing", action=Action.ALLOW, rules=())],
            "allow policies exist, but none allowed",
            id="an ALLOW without rules allows nothing",
        ),
        pytest.param(
            [a_policy(action=Action.DENY, rules=())], None, id="a DENY without rules denies nothing"
        ),
        pytest.param(
            [allow("bank/teller", name="one"), allow("shop/frontend", name="two")],
            None,
            id="one of several ALLOWs is enough",
        ),
        pytest.param(
            [deny("shop/frontend", dry_run=True)], None, id="a dry-run DENY denies nothing"
        ),
        pytest.param(
            [allow("bank/teller", dry_run=True)], None, id="a dry-run ALLOW closes nothing"
        ),
        pytest.param(
            [allow("bank/teller", name="x"), allow("shop/frontend", dry_run=True)],
            "allow policies exist, but none allowed",
            id="a dry-run ALLOW opens nothing",
        ),
    ],
)
def test_a_call_from_frontend(policies: list[Policy], reason: str | None) -> None:
    verdict = authorize(FROM_FRONTEND, policies)
    assert (verdict.reason if isinstance(verdict, Refusal) else None) == reason


@pytest.mark.parametrize(
    ("policies", "notes"),
    [
        ([deny("shop/frontend", dry_run=True)], ("dry-run: deny policy match: shop/deny",)),
        ([allow("shop/frontend", dry_run=True)], ("dry-run: allow policy match: shop/allow",)),
        ([allow("bank/teller", dry_run=True)], ("dry-run: no allow policies match",)),
        ([allow("bank/teller", dry_run=True), allow("shop/frontend", name="real")], ()),
        ([], ()),
    ],
)
def test_dry_run_policies_leave_notes(policies: list[Policy], notes: tuple[str, ...]) -> None:
    assert authorize(FROM_FRONTEND, policies).notes == notes


def test_a_verdict_names_policy_and_rule() -> None:
    other = Match(service_accounts=(an_account("bank/teller"),))
    ours = Match(service_accounts=(an_account("shop/frontend"),))
    policy = a_policy(rules=(((other,),), ((ours,),)))
    verdict = authorize(FROM_FRONTEND, [policy])
    assert isinstance(verdict, Permit)
    assert (verdict.policy, verdict.rule_number) == (policy, 1)
    assert verdict.destination == FROM_FRONTEND.destination
    stop = a_policy("stop", action=Action.DENY, rules=(((other,),), ((ours,),)))
    refusal = authorize(FROM_FRONTEND, [stop])
    assert isinstance(refusal, Refusal)
    assert (refusal.policy, refusal.rule_number) == (stop, 1)


def test_the_policies_of_a_store_are_asked() -> None:
    store = a_store(a_policy("nothing", scope=PolicyScope.NAMESPACE, rules=()))
    assert isinstance(authorize(FROM_FRONTEND, store.policies.for_workload(a_workload())), Refusal)
    elsewhere = store.policies.for_workload(a_workload(ns="bank"))
    assert isinstance(authorize(FROM_FRONTEND, elsewhere), Permit)


def test_another_connection_of_the_same_caller_is_permitted_again() -> None:
    before = a_flow(source="192.0.2.1:40000")
    first = authorize(before, [allow("shop/frontend")])
    assert isinstance(first, Permit)
    flow = dataclasses.replace(before, source_endpoint=Endpoint.parse("192.0.2.1:40001"))
    assert permit_again(first, flow) == authorize(flow, [allow("shop/frontend")])


@pytest.mark.parametrize(
    "other",
    [
        {"source": None},
        {"source": an_identity("stranger")},
        {"source_endpoint": Endpoint.parse("192.0.2.2:40000")},
        {"destination": Endpoint.parse("192.0.2.99:80")},
    ],
)
def test_nothing_else_is_permitted_again(other: dict[str, object]) -> None:
    flow = a_flow()
    permit = authorize(flow, [])
    assert isinstance(permit, Permit)
    with pytest.raises(ValueError, match="was permitted, not"):
        permit_again(permit, dataclasses.replace(flow, **other))
    outbound = authorize_outbound(flow.destination, illegal=())
    assert isinstance(outbound, Permit)
    with pytest.raises(ValueError, match="was permitted, not"):
        permit_again(outbound, flow)


def test_nobody_else_can_make_a_permit() -> None:
    with pytest.raises(TypeError, match="only authorize"):
        Permit(destination=FROM_FRONTEND.destination, flow=FROM_FRONTEND, mint=object())
    with pytest.raises(TypeError):
        Permit(destination=FROM_FRONTEND.destination, flow=FROM_FRONTEND)  # type: ignore[call-arg]


def test_a_permit_cannot_be_altered_into_another() -> None:
    permit = authorize(FROM_FRONTEND, [])
    assert isinstance(permit, Permit)
    elsewhere = Endpoint.parse("192.0.2.99:22")
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(permit, destination=elsewhere)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        permit.destination = elsewhere  # type: ignore[misc]
    assert copy.copy(permit) == permit


@pytest.mark.parametrize(
    ("target", "is_fine"),
    [
        ("127.0.0.1:15001", False),
        ("127.0.0.1:15006", False),
        ("[::1]:15008", False),
        ("127.0.0.1:15080", False),
        ("127.0.0.1:15020", True),
        ("192.0.2.1:15001", True),
        ("127.0.0.1:80", True),
    ],
)
def test_outbound_only_calls_to_ourselves_are_refused(target: str, *, is_fine: bool) -> None:
    verdict = authorize_outbound(Endpoint.parse(target), illegal=illegal_ports(has_socks5=True))
    assert isinstance(verdict, Permit) == is_fine
    assert verdict.destination == Endpoint.parse(target)
    if isinstance(verdict, Refusal):
        assert verdict.reason == "attempted recursive call to ourselves"
        assert verdict.nearest_miss == ""


@pytest.mark.parametrize(
    ("policies", "miss"),
    [
        (
            [allow("bank/teller"), allow("shop/other", name="near")],
            "shop/allow rule 0: service account is shop/frontend, wanted bank/teller",
        ),
        (
            [
                a_policy(
                    "far",
                    match=Match(destination_ports=(1,), namespaces=(exactly("bank"),)),
                ),
                a_policy("near", match=Match(destination_ports=(1, 2, 3, 4, 5))),
            ],
            "shop/near rule 0: destination port is 8080, wanted 1 or 2 or 3 or 2 more",
        ),
        (
            [a_policy(match=Match(not_principals=(StringMatch(MatchKind.PREFIX, "cluster"),)))],
            f"shop/only-frontend rule 0: principal is {PRINCIPAL}, wanted not cluster*",
        ),
        (
            [a_policy(match=Match())],
            "shop/only-frontend rule 0: match is empty, wanted at least one field",
        ),
        ([a_policy(rules=())], "no ALLOW policy has a rule"),
        ([deny("shop/frontend")], ""),
    ],
)
def test_a_refusal_explains_the_nearest_miss(policies: list[Policy], miss: str) -> None:
    refusal = authorize(FROM_FRONTEND, policies)
    assert isinstance(refusal, Refusal)
    assert refusal.nearest_miss == miss


def test_the_nearest_miss_counts_only_clauses_in_the_way() -> None:
    fine = Match(destination_ports=(8080,))
    wrong = Match(source_ips=(ip_network("10.0.0.0/8"),))
    refusal = authorize(FROM_FRONTEND, [a_policy(rules=(((fine,), (), (wrong, Match())),))])
    assert isinstance(refusal, Refusal)
    assert refusal.nearest_miss == (
        "shop/only-frontend rule 0: source ip is 192.0.2.1, wanted 10.0.0.0/8"
    )


# Properties: few distinct values, so that matches and near misses both happen often.

NAMES = ["", "shop", "bank"]
text_matches = st.builds(
    StringMatch,
    st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX]),
    st.sampled_from([*NAMES, "sh", "op", "cluster.local/ns/shop/sa/a", "sa/a"]),
) | st.just(StringMatch(MatchKind.PRESENCE))
cidrs: st.SearchStrategy[IpNetwork] = st.sampled_from(
    [ip_network(c) for c in ("192.0.2.1", "192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32", "::/0")]
)
accounts = st.builds(
    lambda ns, sa: an_account(f"{ns}/{sa}"), st.sampled_from(NAMES), st.sampled_from(["a", "b"])
)
port_numbers = st.sampled_from([80, 8080])


def few(elements: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(elements, max_size=2).map(tuple)


def rare(elements: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.just(()) | st.just(()) | few(elements)


matches = st.builds(
    Match,
    namespaces=rare(text_matches),
    not_namespaces=rare(text_matches),
    principals=rare(text_matches),
    not_principals=rare(text_matches),
    service_accounts=rare(accounts),
    not_service_accounts=rare(accounts),
    source_ips=rare(cidrs),
    not_source_ips=rare(cidrs),
    destination_ips=rare(cidrs),
    not_destination_ips=rare(cidrs),
    destination_ports=rare(port_numbers),
    not_destination_ports=rare(port_numbers),
)
rules = few(few(few(matches)))
policies = st.lists(
    st.builds(
        a_policy,
        st.sampled_from("abcdef"),
        action=st.sampled_from(Action),
        rules=rules,
        dry_run=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda policy: policy.key,
)
identities = st.builds(an_identity, st.sampled_from(["a", "b"]), st.sampled_from(NAMES))
flows = st.builds(
    a_flow,
    by=st.just(NOBODY) | identities,
    source=st.sampled_from(["192.0.2.1:1", "192.0.2.7:1", "[2001:db8::1]:1"]),
    destination=st.sampled_from(["192.0.2.1:80", "10.0.0.1:8080", "[2001:db8::2]:80"]),
)


def text_holds(match: StringMatch, text: str | None) -> bool:
    if text is None:
        return False
    return {
        MatchKind.EXACT: text == match.text,
        MatchKind.PREFIX: text.startswith(match.text),
        MatchKind.SUFFIX: text.endswith(match.text),
        MatchKind.PRESENCE: bool(text),
    }[match.kind]


def naive_match(m: Match, flow: Flow) -> bool:
    if m == Match():
        return False
    who = flow.source
    namespace = who.namespace if who else ""
    tests = [
        (m.namespaces, m.not_namespaces, lambda e: text_holds(e, namespace)),
        (m.principals, m.not_principals, lambda e: text_holds(e, who.principal if who else None)),
        (
            m.service_accounts,
            m.not_service_accounts,
            lambda e: (
                who is not None
                and (e.namespace, e.service_account) == (who.namespace, who.service_account)
            ),
        ),
        (m.source_ips, m.not_source_ips, lambda e: flow.source_endpoint.ip in e),
        (m.destination_ips, m.not_destination_ips, lambda e: flow.destination.ip in e),
        (m.destination_ports, m.not_destination_ports, lambda e: flow.destination.port == e),
    ]
    return all(
        (not wanted or any(map(holds, wanted))) and not any(map(holds, unwanted))
        for wanted, unwanted, holds in tests
    )


def naive_policy(policy: Policy, flow: Flow) -> bool:
    return any(
        all(not clause or any(naive_match(m, flow) for m in clause) for clause in rule)
        for rule in policy.rules
    )


def naive_reason(flow: Flow, given_policies: list[Policy]) -> str | None:
    enforced = [policy for policy in given_policies if not policy.dry_run]
    for policy in enforced:
        if policy.action is Action.DENY and naive_policy(policy, flow):
            return f"explicitly denied by: {policy.key}"
    allows = [policy for policy in enforced if policy.action is Action.ALLOW]
    if not allows or any(naive_policy(policy, flow) for policy in allows):
        return None
    return "allow policies exist, but none allowed"


@given(flow=flows, given_policies=policies)
def test_the_indexed_verdict_is_the_naive_one(flow: Flow, given_policies: list[Policy]) -> None:
    verdict = authorize(flow, given_policies)
    reason = verdict.reason if isinstance(verdict, Refusal) else None
    assert reason == naive_reason(flow, given_policies)
    if isinstance(verdict, Refusal) and not verdict.policy:
        assert verdict.nearest_miss  # whatever it says, there is something to say


@given(flow=flows, given_policies=policies, more=rules)
def test_another_deny_never_lets_more_through(
    flow: Flow, given_policies: list[Policy], more: tuple[()]
) -> None:
    if not is_permitted(flow, *given_policies):
        another = a_policy("another", action=Action.DENY, rules=more)
        assert not is_permitted(flow, *given_policies, another)
