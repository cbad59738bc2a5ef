"""Find the few rules that could match a flow among very many (performance.md 15).

How it works. A rule matches only if each of its clauses does, and a clause only if one of its
matches does, and a match only if each of its fields does. So for any one clause, and for one
positive field in each of its matches, the elements of those fields are a set of *clues* of which
at least one must be true of the flow. The rule is filed under these clues; `probes` lists every
clue that is true of a flow, so looking those up finds each rule that matches and a few that do
not. A rule with a clause-free or negative-only shape is filed under `ALWAYS`. The index is
therefore a superset filter: it never decides, it only saves looking.

Among the possible clues of a rule we take those that are the least crowded when it is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ztunnel.model.flow import Flow
from ztunnel.model.network import Endpoint, IpNetwork
from ztunnel.model.policy import Action, Match, MatchKind, Policy, Rule, StringMatch
from ztunnel.model.workload import PolicyKey
from ztunnel.state.addresses import address_bits, masked, prefix_shape

# A kind and what it is compared with.
Clue = tuple[str, object]

ALWAYS: Clue = ("always", "")
ANONYMOUS: Clue = ("identity", False)  # the flow has no identity
AUTHENTICATED: Clue = ("identity", True)

NEVER = Match()  # a match with no field set never matches (dataplane.md 9.3)


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule of one policy."""

    policy: Policy
    rule_number: int

    @property
    def rule(self) -> Rule:
        """The rule itself."""
        return self.policy.rules[self.rule_number]


class PolicyIndex:
    """Policies of one scope, filed by what their rules need."""

    def __init__(self) -> None:
        self.policies: dict[PolicyKey, Policy] = {}
        self.allows: dict[PolicyKey, Policy] = {}  # enforced ones: with any, silence means no
        self.dry_allows: dict[PolicyKey, Policy] = {}
        self._order = 0
        self._buckets: dict[Clue, dict[tuple[int, int], Entry]] = {}
        self._filed: dict[PolicyKey, list[tuple[Clue, tuple[int, int]]]] = {}
        # How many clues there are of each prefix, suffix or mask length: these are probed.
        self._lengths: dict[str, Counter[int]] = {}

    def add(self, policy: Policy) -> None:
        """File a policy, replacing one of the same key."""
        self.remove(policy.key)
        self._order += 1
        self.policies[policy.key] = policy
        if policy.action is Action.ALLOW:
            (self.dry_allows if policy.dry_run else self.allows)[policy.key] = policy
        filed = self._filed[policy.key] = []
        for number, rule in enumerate(policy.rules):
            entry = Entry(policy, number)
            spot = (self._order, number)
            for clue in self._least_crowded(rule):
                self._buckets.setdefault(clue, {})[spot] = entry
                filed.append((clue, spot))
                self._count_length(clue, 1)

    def remove(self, key: PolicyKey) -> None:
        """Forget a policy; unknown keys are no error."""
        self.policies.pop(key, None)
        self.allows.pop(key, None)
        self.dry_allows.pop(key, None)
        for clue, spot in self._filed.pop(key, ()):
            bucket = self._buckets[clue]
            del bucket[spot]
            if not bucket:
                del self._buckets[clue]
            self._count_length(clue, -1)

    def candidates(self, flow: Flow) -> list[Entry]:
        """Return, in stored order, a superset of the rules that match `flow`."""
        if not self._buckets:
            return []
        found: dict[tuple[int, int], Entry] = {}
        for clue in self._probes(flow):
            if bucket := self._buckets.get(clue):
                found.update(bucket)
        return [found[spot] for spot in sorted(found)]

    def _least_crowded(self, rule: Rule) -> list[Clue]:
        best: list[Clue] = [ALWAYS]
        best_crowd: int | None = None
        for clause in rule:
            clues = list(dict.fromkeys(c for match in clause for c in self._clues_of_match(match)))
            if not clause or ALWAYS in clues:
                continue  # the clause, or one of its alternatives, may hold for anybody
            crowd = sum(len(self._buckets.get(clue, ())) for clue in clues)
            if best_crowd is None or crowd < best_crowd:
                best, best_crowd = clues, crowd
        return best

    def _clues_of_match(self, match: Match) -> list[Clue]:
        """Return clues of the match's least crowded field; none if it can never match."""
        if match == NEVER:
            return []
        best: list[Clue] = [ALWAYS]
        best_crowd: int | None = None
        for clues in _fields(match):
            if ALWAYS in clues:
                continue
            crowd = sum(len(self._buckets.get(clue, ())) for clue in clues)
            if best_crowd is None or crowd < best_crowd:
                best, best_crowd = clues, crowd
        return best

    def _count_length(self, clue: Clue, step: int) -> None:
        kind, value = clue
        if kind.endswith(("prefix", "suffix")):
            assert isinstance(value, str)
            length = len(value)
        elif kind.startswith("cidr"):
            assert isinstance(value, tuple)
            length = value[0]
        else:
            return
        lengths = self._lengths.setdefault(kind, Counter())
        lengths[length] += step
        if not lengths[length]:
            del lengths[length]

    def _probes(self, flow: Flow) -> Iterator[Clue]:
        """Yield every clue that is true of `flow` and may be in use."""
        yield ALWAYS
        source = flow.source
        if source is None:
            yield ANONYMOUS
            yield from self._probe_text("namespace", "")
        else:
            yield AUTHENTICATED
            yield ("account", (source.namespace, source.service_account))
            yield from self._probe_text("principal", source.principal)
            yield from self._probe_text("namespace", source.namespace)
        yield ("port", flow.destination.port)
        yield from self._probe_address("source", flow.source_endpoint)
        yield from self._probe_address("destination", flow.destination)

    def _probe_text(self, field: str, text: str) -> Iterator[Clue]:
        yield (field, text)
        for length in self._lengths.get(f"{field} prefix", ()):
            yield (f"{field} prefix", text[:length])
        for length in self._lengths.get(f"{field} suffix", ()):
            yield (f"{field} suffix", text[-length:] if length else "")

    def _probe_address(self, field: str, endpoint: Endpoint) -> Iterator[Clue]:
        kind = f"cidr{address_bits(endpoint.ip)} {field}"
        for length in self._lengths.get(kind, ()):
            yield (kind, (length, masked(endpoint.ip, length)))


def _fields(match: Match) -> Iterator[list[Clue]]:
    """Yield, for each field that demands something positive, clues of which one must hold.

    Roughly from the most to the least telling, as the first of equals is taken.
    """
    if match.principals:
        yield [_text_clue("principal", wanted) for wanted in match.principals]
    if match.service_accounts:
        yield [("account", (m.namespace, m.service_account)) for m in match.service_accounts]
    if match.source_ips:
        yield [_cidr_clue("source", cidr) for cidr in match.source_ips]
    if match.namespaces:
        yield [_text_clue("namespace", wanted) for wanted in match.namespaces]
    if match.destination_ips:
        yield [_cidr_clue("destination", cidr) for cidr in match.destination_ips]
    if match.destination_ports:
        yield [("port", port) for port in match.destination_ports]
    if any(unwanted.kind is MatchKind.PRESENCE for unwanted in match.not_principals):
        yield [ANONYMOUS]  # a principal is never empty: this is how STRICT mutual TLS is written


def _text_clue(field: str, wanted: StringMatch) -> Clue:
    match wanted.kind:
        case MatchKind.EXACT:
            return (field, wanted.text)
        case MatchKind.PREFIX:
            return (f"{field} prefix", wanted.text)
        case MatchKind.SUFFIX:
            return (f"{field} suffix", wanted.text)
        case MatchKind.PRESENCE:
            return AUTHENTICATED if field == "principal" else ALWAYS


def _cidr_clue(field: str, cidr: IpNetwork) -> Clue:
    bits, length = prefix_shape(cidr)
    return (f"cidr{bits} {field}", (length, masked(cidr.network_address, length)))
