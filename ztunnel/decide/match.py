"""Does a rule match a flow (dataplane.md 9.3), and if not, what is in the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ztunnel.model.flow import Flow
from ztunnel.model.identity import Identity
from ztunnel.model.network import IpAddress, IpNetwork
from ztunnel.model.policy import (
    Clause,
    Match,
    MatchKind,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)

E = TypeVar("E")
S = TypeVar("S")

EMPTY = Match()


def rule_matches(rule: Rule, flow: Flow) -> bool:
    """Tell whether every clause of the rule holds; no clauses hold for everything."""
    return all(clause_matches(clause, flow) for clause in rule)


def clause_matches(clause: Clause, flow: Flow) -> bool:
    """Tell whether any match of the clause does; no matches match everything."""
    return not clause or any(match_holds(match, flow) for match in clause)


def match_holds(match: Match, flow: Flow) -> bool:
    """Tell whether every field holds; with no field set nothing matches.

    A Kubernetes rule that we cannot express arrives as an empty match: it must match nothing.
    """
    # The same as "no failing fields", without words for them: this is asked for every connection.
    source, port = flow.source, flow.destination.port
    principal, namespace = (source.principal, source.namespace) if source else (None, "")
    return (
        _fits(port, match.destination_ports, match.not_destination_ports, _same_port)
        and _fits(principal, match.principals, match.not_principals, _text_matches)
        and _fits(namespace, match.namespaces, match.not_namespaces, _text_matches)
        and _fits_account(match, source)
        and _fits(flow.source_endpoint.ip, match.source_ips, match.not_source_ips, _is_inside)
        and _fits(flow.destination.ip, match.destination_ips, match.not_destination_ips, _is_inside)
        and match != EMPTY
    )


def _fits_account(match: Match, source: Identity | None) -> bool:
    wanted, unwanted = match.service_accounts, match.not_service_accounts
    if not (wanted or unwanted):
        return True
    account = ServiceAccountMatch(source.namespace, source.service_account) if source else None
    return _fits(account, wanted, unwanted, _same_account)


@dataclass(frozen=True, slots=True)
class Failing:
    """One field that stands in the way: the name policies use, what is, what was asked."""

    field: str
    found: str
    wanted: str


def failing_fields(match: Match, flow: Flow) -> Iterator[Failing]:
    """Yield each field pair of `match` that does not hold, cheapest first."""
    source = flow.source
    principal = source.principal if source else None
    namespace = source.namespace if source else ""
    ports = (match.destination_ports, match.not_destination_ports)
    yield from _judge("destination port", flow.destination.port, *ports, _same_port)
    principals = (match.principals, match.not_principals)
    yield from _judge("principal", principal, *principals, _text_matches)
    yield from _judge("namespace", namespace, match.namespaces, match.not_namespaces, _text_matches)
    account = ServiceAccountMatch(source.namespace, source.service_account) if source else None
    accounts = (match.service_accounts, match.not_service_accounts)
    yield from _judge("service account", account, *accounts, _same_account)
    callers = (match.source_ips, match.not_source_ips)
    yield from _judge("source ip", flow.source_endpoint.ip, *callers, _is_inside)
    called = (match.destination_ips, match.not_destination_ips)
    yield from _judge("destination ip", flow.destination.ip, *called, _is_inside)


def _fits(
    subject: S,
    wanted: Collection[E],
    unwanted: Collection[E],
    matches: Callable[[E, S], bool],
) -> bool:
    """Tell whether (none wanted or one holds) and (none unwanted holds)."""
    if wanted and not any(matches(element, subject) for element in wanted):
        return False
    return not (unwanted and any(matches(element, subject) for element in unwanted))


def _judge(
    field: str,
    subject: S,
    wanted: Collection[E],
    unwanted: Collection[E],
    matches: Callable[[E, S], bool],
) -> Iterator[Failing]:
    """Yield a failure unless (none wanted or one holds) and (none unwanted holds)."""
    if wanted and not any(matches(element, subject) for element in wanted):
        yield Failing(field, _show(subject), _list(tuple(wanted)))
    elif unwanted and any(matches(element, subject) for element in unwanted):
        yield Failing(field, _show(subject), f"not {_list(tuple(unwanted))}")


def _text_matches(wanted: StringMatch, subject: str | None) -> bool:
    if subject is None:
        return False
    match wanted.kind:
        case MatchKind.EXACT:
            return subject == wanted.text
        case MatchKind.PREFIX:
            return subject.startswith(wanted.text)
        case MatchKind.SUFFIX:
            return subject.endswith(wanted.text)
        case MatchKind.PRESENCE:
            return subject != ""


def _same_account(wanted: ServiceAccountMatch, subject: ServiceAccountMatch | None) -> bool:
    return wanted == subject


def _same_port(wanted: int, subject: int) -> bool:
    return wanted == subject


def _is_inside(wanted: IpNetwork, subject: IpAddress) -> bool:
    return subject in wanted


LISTED_MAX = 3  # a policy may name hundreds; a person needs a few


def _list(elements: Sequence[object]) -> str:
    shown = " or ".join(_show(element) for element in elements[:LISTED_MAX])
    more = len(elements) - LISTED_MAX
    return f"{shown} or {more} more" if more > 0 else shown


def _show(subject: object) -> str:
    match subject:
        case None:
            return "none"
        case ServiceAccountMatch(namespace=namespace, service_account=account):
            return f"{namespace}/{account}"
        case StringMatch(kind=kind, text=text):
            return _PATTERNS[kind].format(text) or '""'
        case _:
            return str(subject) or '""'


_PATTERNS = {
    MatchKind.EXACT: "{}",
    MatchKind.PREFIX: "{}*",
    MatchKind.SUFFIX: "*{}",
    MatchKind.PRESENCE: "any",
}
