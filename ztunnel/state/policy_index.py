"""Find the few rules that could match a flow among very many (performance.md 15).

How it works. A rule matches only if each of its clauses does, a clause only if one of its matches
does, and a match only if each of its fields does. A positive field is a choice of *clues*, one
for each element ("the namespace is shop", "the principal begins with x"); multiplied out, a rule
becomes a few sets of clues, and it can match only flows of which one whole set is true. It is
filed under each of its sets. Where that would be too many sets, clauses or fields are left out;
negative fields always are. So the index is a superset filter: it never decides, it only saves
looking.

Clues of one `Kind` are compared with one and the same fact of the flow, so all sets of one shape
(the same kinds in the same order) need one dictionary read together, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias, TypeVar

from ztunnel.model.flow import Flow
from ztunnel.model.network import Endpoint, IpNetwork
from ztunnel.model.policy import Action, Match, MatchKind, Policy, Rule, StringMatch
from ztunnel.model.workload import PolicyKey
from ztunnel.state.addresses import address_bits, masked, prefix_shape

T = TypeVar("T")

# What is compared, and for prefixes, suffixes and masks how much of it; else 0.
Kind: TypeAlias = tuple[str, int]
Clue: TypeAlias = tuple[Kind, object]
Clues: TypeAlias = tuple[Clue, ...]  # all must be true; none at all is always true
Shape: TypeAlias = tuple[Kind, ...]
Values: TypeAlias = tuple[object, ...]
Spot: TypeAlias = tuple[int, int]  # when the policy was stored, and the number of the rule

# One rule may become this many sets, or this many times the elements that somebody wrote.
SETS_MAX = 64
SETS_PER_ELEMENT_MAX = 4
# Each shape costs every flow a dictionary read; beyond this, sets are cut down to one clue.
SHAPES_MAX = 128

NEVER = Match()  # a match with no field set never matches (dataplane.md 9.3)
HAS_IDENTITY: Clue = (("identity", 0), True)
HAS_NO_IDENTITY: Clue = (("identity", 0), False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule of one policy."""

    policy: Policy
    rule_number: int

    @property
    def rule(self) -> Rule:
        """The rule itself."""
        return self.policy.rules[self.rule_number]


class _Table:
    """The rules whose needs have one shape, by what a flow must show for each kind of it."""

    __slots__ = ("rows", "shape")

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.rows: dict[Values, dict[Spot, Entry]] = {}


class PolicyIndex:
    """Policies of one scope, filed by what their rules need."""

    def __init__(self) -> None:
        self.policies: dict[PolicyKey, Policy] = {}
        self.allows: dict[PolicyKey, Policy] = {}  # enforced ones: with any, silence means no
        self.dry_allows: dict[PolicyKey, Policy] = {}
        self._order = 0
        self._tables: dict[Shape, _Table] = {}
        self._filed: dict[PolicyKey, list[tuple[_Table, Values, Spot]]] = {}

    def add(self, policy: Policy) -> None:
        """File a policy, replacing one of the same key."""
        self.remove(policy.key)
        self._order += 1
        self.policies[policy.key] = policy
        if policy.action is Action.ALLOW:
            (self.dry_allows if policy.dry_run else self.allows)[policy.key] = policy
        filed = self._filed[policy.key] = []
        for number, rule in enumerate(policy.rules):
            entry, spot = Entry(policy, number), (self._order, number)
            for clues in needs_of_rule(rule):
                table, values = self._place_for(clues)
                table.rows.setdefault(values, {})[spot] = entry
                filed.append((table, values, spot))

    def remove(self, key: PolicyKey) -> None:
        """Forget a policy; unknown keys are no error."""
        self.policies.pop(key, None)
        self.allows.pop(key, None)
        self.dry_allows.pop(key, None)
        for table, values, spot in self._filed.pop(key, ()):
            row = table.rows.get(values, {})
            # Gone already if two sets of one rule were cut down to the same clue.
            row.pop(spot, None)
            if not row:
                table.rows.pop(values, None)
            if not table.rows:
                self._tables.pop(table.shape, None)

    def swap(self, other: PolicyIndex) -> None:
        """Give another one what is here and take what is there, however much it is."""
        self.__dict__, other.__dict__ = other.__dict__, self.__dict__

    def candidates(self, flow: Flow) -> list[Entry]:
        """Return, in stored order, a superset of the rules that match `flow`."""
        facts: dict[Kind, object] = {}
        found: dict[Spot, Entry] = {}
        for table in self._tables.values():
            for kind in table.shape:
                if kind not in facts:
                    facts[kind] = _FACTS[kind[0]](flow, kind[1])
            if row := table.rows.get(tuple([facts[kind] for kind in table.shape])):
                found.update(row)
        return [found[spot] for spot in sorted(found)] if found else []

    def _place_for(self, clues: Clues) -> tuple[_Table, Values]:
        shape = tuple([kind for kind, _ in clues])
        table = self._tables.get(shape)
        if table is None:
            if len(clues) > 1 and len(self._tables) >= SHAPES_MAX:
                return self._place_for(clues[:1])
            table = self._tables[shape] = _Table(shape)
        return table, tuple([value for _, value in clues])


def needs_of_rule(rule: Rule) -> list[Clues]:
    """Return sets of clues of which one is true of every flow that the rule matches.

    No sets at all: the rule never matches.
    """
    choices: list[Sequence[Clues]] = []
    for clause in rule:
        if not clause:
            continue
        choice = [clues for match in clause for clues in _needs_of_match(match)]
        if () not in choice:  # else one alternative may hold for anybody
            choices.append(choice)
    return [tuple(clue for clues in needs for clue in clues) for needs in _multiply(choices)]


def _needs_of_match(match: Match) -> list[Clues]:
    return [] if match == NEVER else list(_multiply(_fields(match)))


def _multiply(choices: Iterable[Sequence[T]]) -> Iterator[tuple[T, ...]]:
    """Combine one of each choice, leaving out choices that would make it too many."""
    offered = sorted(choices, key=len)
    budget = max(SETS_MAX, SETS_PER_ELEMENT_MAX * sum(map(len, offered)))
    kept: list[Sequence[T]] = []
    count = 1
    for choice in offered:
        if count * len(choice) <= budget:
            kept.append(choice)
            count *= len(choice)
    return product(*kept)


def _fields(match: Match) -> list[list[Clue]]:
    """Return for each field that demands something positive its clues; the most telling first."""
    fields: list[list[Clue | None]] = [
        [_text_clue("principal", wanted) for wanted in match.principals],
        [(("account", 0), (m.namespace, m.service_account)) for m in match.service_accounts],
        [_cidr_clue("source", cidr) for cidr in match.source_ips],
        [_text_clue("namespace", wanted) for wanted in match.namespaces],
        [_cidr_clue("destination", cidr) for cidr in match.destination_ips],
        [(("port", 0), port) for port in match.destination_ports],
    ]
    telling = [[clue for clue in clues if clue] for clues in fields if clues and None not in clues]
    if any(unwanted.kind is MatchKind.PRESENCE for unwanted in match.not_principals):
        # A principal is never empty: this is how STRICT mutual TLS is written.
        telling.append([HAS_NO_IDENTITY])
    return telling


def _text_clue(field: str, wanted: StringMatch) -> Clue | None:
    """Return the clue for one element; None if it tells nothing."""
    match wanted.kind:
        case MatchKind.EXACT:
            return (field, 0), wanted.text
        case MatchKind.PREFIX:
            return (f"{field} prefix", len(wanted.text)), wanted.text
        case MatchKind.SUFFIX:
            return (f"{field} suffix", len(wanted.text)), wanted.text
        case MatchKind.PRESENCE:
            return HAS_IDENTITY if field == "principal" else None


def _cidr_clue(field: str, cidr: IpNetwork) -> Clue:
    bits, length = prefix_shape(cidr)
    return (f"{field} of {bits}", length), masked(cidr.network_address, length)


# What a flow shows for each kind; None, which no clue wants, when it has no such thing.


def _principal(flow: Flow, _: int) -> str | None:
    return flow.source.principal if flow.source else None


def _principal_prefix(flow: Flow, length: int) -> str | None:
    return flow.source.principal[:length] if flow.source else None


def _principal_suffix(flow: Flow, length: int) -> str | None:
    return _ending(flow.source.principal, length) if flow.source else None


def _account(flow: Flow, _: int) -> tuple[str, str] | None:
    return (flow.source.namespace, flow.source.service_account) if flow.source else None


def _namespace(flow: Flow) -> str:
    return flow.source.namespace if flow.source else ""


def _ending(text: str, length: int) -> str:
    return text[-length:] if length else ""


def _masked(endpoint: Endpoint, bits: int, length: int) -> int | None:
    return masked(endpoint.ip, length) if address_bits(endpoint.ip) == bits else None


_FACTS: dict[str, Callable[[Flow, int], object]] = {
    "identity": lambda flow, _: flow.source is not None,
    "principal": _principal,
    "principal prefix": _principal_prefix,
    "principal suffix": _principal_suffix,
    "account": _account,
    "namespace": lambda flow, _: _namespace(flow),
    "namespace prefix": lambda flow, length: _namespace(flow)[:length],
    "namespace suffix": lambda flow, length: _ending(_namespace(flow), length),
    "port": lambda flow, _: flow.destination.port,
    "source of 32": lambda flow, length: _masked(flow.source_endpoint, 32, length),
    "source of 128": lambda flow, length: _masked(flow.source_endpoint, 128, length),
    "destination of 32": lambda flow, length: _masked(flow.destination, 32, length),
    "destination of 128": lambda flow, length: _masked(flow.destination, 128, length),
}
