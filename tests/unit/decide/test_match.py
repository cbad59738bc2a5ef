from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import NOBODY, a_flow, an_account, exactly
from ztunnel.decide.match import clause_matches, failing_fields, match_holds, rule_matches
from ztunnel.model.flow import Flow
from ztunnel.model.policy import Match, MatchKind, Rule, StringMatch

FROM_FRONTEND = a_flow()
ANONYMOUS = a_flow(by=NOBODY)
FINE = Match(destination_ports=(8080,))
WRONG = Match(destination_ports=(1,))
PRESENCE = StringMatch(MatchKind.PRESENCE)
PRINCIPAL = "cluster.local/ns/shop/sa/frontend"


def prefix(text: str) -> StringMatch:
    return StringMatch(MatchKind.PREFIX, text)


def suffix(text: str) -> StringMatch:
    return StringMatch(MatchKind.SUFFIX, text)


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        pytest.param((), True, id="no clauses"),
        pytest.param(((),), True, id="a clause without matches"),
        pytest.param(((Match(),),), False, id="a match without fields"),
        pytest.param(((Match(), FINE),), True, id="an empty match beside a fitting one"),
        pytest.param(((FINE,), (WRONG,)), False, id="every clause must hold"),
        pytest.param(((WRONG, FINE),), True, id="one match of a clause is enough"),
        pytest.param(((FINE,), (), (FINE,)), True, id="all hold"),
    ],
)
def test_emptiness(rule: Rule, *, matches: bool) -> None:
    assert rule_matches(rule, FROM_FRONTEND) == matches


def test_a_clause_without_matches_holds() -> None:
    assert clause_matches((), ANONYMOUS)
    assert not clause_matches((WRONG,), ANONYMOUS)


# Each row: one element, whether it fits a call by cluster.local/ns/shop/sa/frontend from
# 192.0.2.1 to 192.0.2.10:8080, and whether it fits the same call without mutual TLS.
ELEMENTS = [
    ("namespaces", exactly("shop"), True, False),
    ("namespaces", exactly("Shop"), False, False),
    ("namespaces", exactly(""), False, True),
    ("namespaces", prefix("sh"), True, False),
    ("namespaces", prefix(""), True, True),
    ("namespaces", suffix("op"), True, False),
    ("namespaces", suffix(""), True, True),
    ("namespaces", PRESENCE, True, False),
    ("principals", exactly(PRINCIPAL), True, False),
    ("principals", exactly(f"spiffe://{PRINCIPAL}"), False, False),
    ("principals", prefix("cluster.local/"), True, False),
    ("principals", prefix(""), True, False),
    ("principals", suffix("/sa/frontend"), True, False),
    ("principals", suffix("/sa/front"), False, False),
    ("principals", PRESENCE, True, False),
    ("service_accounts", an_account("shop/frontend"), True, False),
    ("service_accounts", an_account("shop/backend"), False, False),
    ("service_accounts", an_account("bank/frontend"), False, False),
    ("source_ips", ip_network("192.0.2.1"), True, True),
    ("source_ips", ip_network("192.0.2.0/24"), True, True),
    ("source_ips", ip_network("192.0.2.10"), False, False),
    ("source_ips", ip_network("::/0"), False, False),
    ("destination_ips", ip_network("192.0.2.10"), True, True),
    ("destination_ips", ip_network("192.0.2.1"), False, False),
    ("destination_ports", 8080, True, True),
    ("destination_ports", 80, False, False),
]


@pytest.mark.parametrize(("field", "element", "fits", "fits_anonymous"), ELEMENTS)
def test_each_field(field: str, element: Any, *, fits: bool, fits_anonymous: bool) -> None:
    wanted = Match(**{field: (element,)})
    assert match_holds(wanted, FROM_FRONTEND) == fits
    assert match_holds(wanted, ANONYMOUS) == fits_anonymous


@pytest.mark.parametrize(("field", "element", "fits", "fits_anonymous"), ELEMENTS)
def test_each_field_negated(field: str, element: Any, *, fits: bool, fits_anonymous: bool) -> None:
    unwanted = Match(**{f"not_{field}": (element,)})
    assert match_holds(unwanted, FROM_FRONTEND) != fits
    assert match_holds(unwanted, ANONYMOUS) != fits_anonymous


def test_any_wanted_element_is_enough_and_any_unwanted_one_too_much() -> None:
    assert match_holds(Match(destination_ports=(1, 8080)), FROM_FRONTEND)
    assert not match_holds(Match(not_destination_ports=(1, 8080)), FROM_FRONTEND)
    assert not match_holds(
        Match(destination_ports=(8080,), not_destination_ports=(8080,)), FROM_FRONTEND
    )


def test_every_field_must_hold() -> None:
    both = Match(destination_ports=(8080,), namespaces=(exactly("shop"),))
    assert match_holds(both, FROM_FRONTEND)
    assert not match_holds(both, ANONYMOUS)


def test_strict_mutual_tls_matches_only_who_has_no_identity() -> None:
    strict = Match(not_principals=(PRESENCE,))
    assert match_holds(strict, ANONYMOUS)
    assert not match_holds(strict, FROM_FRONTEND)


@pytest.mark.parametrize(
    ("match", "text"),
    [
        (Match(principals=(PRESENCE,)), "principal is none, wanted any"),
        (Match(service_accounts=(an_account("a/b"),)), "service account is none, wanted a/b"),
        (Match(namespaces=(exactly("a"),)), 'namespace is "", wanted a'),
        (Match(namespaces=(prefix("a"), suffix("b"))), 'namespace is "", wanted a* or *b'),
        (Match(not_namespaces=(exactly(""),)), 'namespace is "", wanted not ""'),
        (Match(source_ips=(ip_network("::1"),)), "source ip is 192.0.2.1, wanted ::1/128"),
    ],
)
def test_what_stands_in_the_way_is_said_in_words(match: Match, text: str) -> None:
    (failing,) = failing_fields(match, ANONYMOUS)
    assert f"{failing.field} is {failing.found}, wanted {failing.wanted}" == text


@given(
    chosen=st.lists(st.tuples(st.sampled_from(ELEMENTS), st.booleans()), max_size=4),
    flow=st.sampled_from([FROM_FRONTEND, ANONYMOUS]),
)
def test_a_match_holds_exactly_when_there_is_nothing_to_explain(
    chosen: list[tuple[tuple[str, Any, bool, bool], bool]], flow: Flow
) -> None:
    fields: dict[str, tuple[Any, ...]] = {}
    for (field, element, _, _), negated in chosen:
        name = f"not_{field}" if negated else field
        fields[name] = (*fields.get(name, ()), element)
    match = Match(**fields)
    assert match_holds(match, flow) == bool(fields and not list(failing_fields(match, flow)))
