from __future__ import annotations

from ipaddress import ip_network

import pytest

from tests.support.builders import (
    NOBODY,
    a_flow,
    a_policy,
    allow,
    an_account,
    an_identity,
    deny,
    exactly,
)
from ztunnel.model.flow import Flow
from ztunnel.model.policy import Match, MatchKind, Policy, Rule, StringMatch
from ztunnel.model.workload import PolicyKey
from ztunnel.state.policy_index import SHAPES_MAX, PolicyIndex, needs_of_rule

FROM_FRONTEND = a_flow()
ANONYMOUS = a_flow(by=NOBODY)
PRESENCE = StringMatch(MatchKind.PRESENCE)


def indexed(*policies: Policy) -> PolicyIndex:
    index = PolicyIndex()
    for policy in policies:
        index.add(policy)
    return index


def is_candidate(flow: Flow, *rules: Rule) -> bool:
    return bool(indexed(a_policy(rules=rules)).candidates(flow))


OURS = [
    Match(principals=(exactly("cluster.local/ns/shop/sa/frontend"),)),
    Match(principals=(StringMatch(MatchKind.PREFIX, "cluster.local/"),)),
    Match(principals=(StringMatch(MatchKind.SUFFIX, "/frontend"),)),
    Match(principals=(PRESENCE,)),
    Match(namespaces=(exactly("shop"),)),
    Match(namespaces=(StringMatch(MatchKind.PREFIX, "sh"),)),
    Match(namespaces=(StringMatch(MatchKind.SUFFIX, ""),)),
    Match(namespaces=(PRESENCE,)),
    Match(service_accounts=(an_account("shop/frontend"),)),
    Match(source_ips=(ip_network("192.0.2.0/24"),)),
    Match(destination_ips=(ip_network("192.0.2.10"),)),
    Match(destination_ips=(ip_network("0.0.0.0/0"),)),
    Match(destination_ports=(1, 8080)),
    Match(not_namespaces=(exactly("bank"),)),
]
THEIRS = [
    Match(principals=(exactly("cluster.local/ns/bank/sa/teller"),)),
    Match(principals=(StringMatch(MatchKind.PREFIX, "other/"),)),
    Match(principals=(StringMatch(MatchKind.SUFFIX, "/teller"),)),
    Match(not_principals=(PRESENCE,)),
    Match(namespaces=(exactly("bank"),)),
    Match(service_accounts=(an_account("shop/backend"),)),
    Match(source_ips=(ip_network("198.51.100.0/24"), ip_network("::/0"))),
    Match(destination_ips=(ip_network("192.0.2.11"),)),
    Match(destination_ports=(1,)),
    Match(destination_ports=(1,), namespaces=(PRESENCE,)),
    Match(),
]


@pytest.mark.parametrize("match", OURS)
def test_a_rule_that_matches_is_a_candidate(match: Match) -> None:
    assert is_candidate(FROM_FRONTEND, ((match,),))
    assert is_candidate(FROM_FRONTEND, ((*THEIRS, match),))
    assert is_candidate(FROM_FRONTEND, ((match,), (OURS[0],)))


@pytest.mark.parametrize("match", THEIRS)
def test_a_rule_about_others_is_not_looked_at(match: Match) -> None:
    assert not is_candidate(FROM_FRONTEND, ((match,),))


def test_one_hopeless_clause_is_enough_not_to_look() -> None:
    assert not is_candidate(FROM_FRONTEND, ((Match(),), (OURS[0],)))


def test_strict_mutual_tls_is_looked_at_for_plaintext_only() -> None:
    strict = Match(not_principals=(PRESENCE,))
    assert is_candidate(ANONYMOUS, ((strict,),))
    assert not is_candidate(ANONYMOUS, ((Match(principals=(PRESENCE,)),),))


def test_rules_that_hold_for_everybody_are_always_looked_at() -> None:
    assert is_candidate(ANONYMOUS, ())
    assert is_candidate(ANONYMOUS, ((),))


def test_no_rules_no_candidates() -> None:
    assert indexed(a_policy(rules=())).candidates(ANONYMOUS) == []


def test_candidates_come_in_stored_order_each_once() -> None:
    twice = Match(destination_ports=(8080, 80), namespaces=(exactly("shop"), PRESENCE))
    policies = [a_policy(name, rules=(((twice,),), ())) for name in "cab"]
    found = indexed(*policies).candidates(FROM_FRONTEND)
    assert [(entry.policy.name, entry.rule_number) for entry in found] == [
        (name, number) for name in "cab" for number in (0, 1)
    ]


def test_a_rule_is_looked_at_only_if_all_it_needs_is_there() -> None:
    # All of them are about the right namespace and the right port: each alone says nothing.
    crowd = [
        a_policy(
            f"p{number}",
            rules=(
                (
                    (Match(namespaces=(exactly("shop"),), source_ips=(ip_network("10.0.0.1"),)),),
                    (Match(destination_ports=(8080,)),),
                ),
            ),
        )
        for number in range(50)
    ]
    assert indexed(*crowd).candidates(FROM_FRONTEND) == []


def test_what_a_rule_needs() -> None:
    port, shop = Match(destination_ports=(80,)), Match(namespaces=(exactly("shop"),))
    is_80, is_shop = (("port", 0), 80), (("namespace", 0), "shop")
    negative = Match(not_namespaces=(exactly("bank"),))
    assert needs_of_rule(()) == needs_of_rule(((),)) == [()]
    assert needs_of_rule(((port, shop),)) == [(is_80,), (is_shop,)]
    assert needs_of_rule(((port,), (shop,))) == [(is_80, is_shop)]
    assert needs_of_rule(((port, negative), (shop,))) == [(is_shop,)]
    assert needs_of_rule(((port,), (Match(),))) == []


def test_a_long_list_is_filed_in_proportion_to_its_length() -> None:
    accounts = tuple(an_account(f"shop/sa-{number}") for number in range(500))
    match = Match(service_accounts=accounts, destination_ports=(80, 8080), namespaces=(PRESENCE,))
    assert len(needs_of_rule(((match,),))) <= 1000
    assert len(needs_of_rule(((match,), (match,), (match,)))) <= 1000
    fitting = Match(service_accounts=(*accounts, an_account("shop/frontend")))
    assert is_candidate(FROM_FRONTEND, ((fitting,), (OURS[-2],)))
    assert not is_candidate(a_flow(by=an_identity("other")), ((fitting,), (OURS[-2],)))


def test_rules_of_very_many_shapes_are_still_found_and_still_removed() -> None:
    principal = "cluster.local/ns/shop/sa/frontend"
    shapes = [(begin, end) for begin in range(16) for end in range(1, 17)]
    assert len(shapes) > SHAPES_MAX
    policies = [
        a_policy(
            f"p{begin}-{end}",
            match=Match(
                principals=(StringMatch(MatchKind.PREFIX, principal[:begin]),),
                namespaces=(StringMatch(MatchKind.PREFIX, "shop"[: end % 4]),),
                source_ips=(ip_network(("192.0.2.1", 32 - end), strict=False),),
                destination_ports=(80, 8080),
            ),
        )
        for begin, end in shapes
    ]
    index = indexed(*policies)
    assert len(index.candidates(FROM_FRONTEND)) == len(policies)
    for policy in policies:
        index.remove(policy.key)
    assert index.candidates(FROM_FRONTEND) == []


def test_a_removed_policy_leaves_nothing_behind() -> None:
    index = indexed()
    policies = [a_policy(str(n), match=m) for n, m in enumerate([*OURS, *THEIRS])]
    for policy in policies:
        index.add(policy)
    for policy in policies:
        index.remove(policy.key)
    assert not index.candidates(FROM_FRONTEND)
    assert not index.policies
    assert not index.allows
    index.remove(PolicyKey("shop/unknown"))


def test_a_policy_stored_again_replaces_itself() -> None:
    index = indexed(allow("shop/frontend", name="p"))
    index.add(deny("bank/teller", name="p"))
    assert not index.candidates(FROM_FRONTEND)
    assert not index.allows
    assert index.candidates(a_flow(by=an_identity("teller", "bank")))


def test_enforced_and_tried_out_allows_are_told_apart() -> None:
    index = indexed(
        allow(name="real"), allow(name="dry", dry_run=True), deny(name="no"), deny(name="non")
    )
    assert [policy.name for policy in index.allows.values()] == ["real"]
    assert [policy.name for policy in index.dry_allows.values()] == ["dry"]


def test_ten_thousand_policies_about_others_are_not_looked_at() -> None:
    index = indexed(
        *(
            a_policy(f"p{number}", match=Match(namespaces=(exactly(f"ns-{number}"),)))
            for number in range(10_000)
        ),
        allow("shop/frontend"),
    )
    assert len(index.candidates(FROM_FRONTEND)) == 1
