"""Policies judge a flow: a Permit, or a Refusal with its reason (dataplane.md 9).

Only this file can make a `Permit`, and connecting takes one by type.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import InitVar, dataclass
from itertools import islice

from ztunnel.decide.classify import SELF_CALL, is_outbound_self_call
from ztunnel.decide.match import EMPTY, Failing, failing_fields, rule_matches
from ztunnel.model.flow import Flow
from ztunnel.model.network import Endpoint
from ztunnel.model.policy import Action, Clause, Policy
from ztunnel.state.policies import PolicySet
from ztunnel.state.policy_index import Entry

_MINT = object()  # who has this may make permits

NOT_ALLOWED = "allow policies exist, but none allowed"

# A refusal explains itself from this many policies and rules at most, so that a flood of
# refused connections cannot make us read ten thousand policies for each.
EXPLAINED_POLICIES_MAX = 16
EXPLAINED_RULES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """Leave to connect to `destination`; `flow` is None outbound, where there is no policy.

    `policy` and `rule_number` say which ALLOW matched; None when there was none to match.
    `notes` tell what dry-run policies would have done.
    """

    destination: Endpoint
    flow: Flow | None
    policy: Policy | None = None
    rule_number: int | None = None
    notes: tuple[str, ...] = ()
    mint: InitVar[object]

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("only authorize() and authorize_outbound() make permits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """No leave to connect, and why: `reason` is in the reference's words."""

    destination: Endpoint
    flow: Flow | None
    reason: str
    policy: Policy | None = None
    rule_number: int | None = None
    notes: tuple[str, ...] = ()
    allows: tuple[Policy, ...] = ()  # some of the ALLOW policies that did not match

    @property
    def nearest_miss(self) -> str:
        """Say which ALLOW rule came closest and what stood in the way; "" when denied."""
        if self.flow is None:
            return ""
        misses = [miss for policy in self.allows for miss in _misses(policy, self.flow)]
        if not misses:
            return "no ALLOW policy has a rule" if self.allows else ""
        failing, policy_key, number = min(misses, key=lambda miss: len(miss[0]))
        obstacles = "; ".join(
            f"{field.field} is {field.found}, wanted {field.wanted}" for field in failing
        )
        return f"{policy_key} rule {number}: {obstacles}"


def authorize(flow: Flow, policies: PolicySet | Iterable[Policy]) -> Permit | Refusal:
    """Judge a flow: any DENY refuses; with ALLOW policies one of them must match.

    Dry-run policies are evaluated and noted, and change nothing.
    """
    if not isinstance(policies, PolicySet):
        policies = PolicySet.of(policies)
    matching = [e for e in policies.candidates(flow) if rule_matches(e.rule, flow)]
    notes = _notes(matching, policies)
    if denied_by := _first_enforced(matching, Action.DENY):
        return Refusal(
            destination=flow.destination,
            flow=flow,
            reason=f"explicitly denied by: {denied_by.policy.key}",
            policy=denied_by.policy,
            rule_number=denied_by.rule_number,
            notes=notes,
        )
    allowed_by = _first_enforced(matching, Action.ALLOW)
    if allowed_by is None and policies.has_allow:
        return Refusal(
            destination=flow.destination,
            flow=flow,
            reason=NOT_ALLOWED,
            notes=notes,
            allows=tuple(islice(policies.allows(), EXPLAINED_POLICIES_MAX)),
        )
    return Permit(
        destination=flow.destination,
        flow=flow,
        policy=allowed_by.policy if allowed_by else None,
        rule_number=allowed_by.rule_number if allowed_by else None,
        notes=notes,
        mint=_MINT,
    )


def permit_again(permit: Permit, flow: Flow) -> Permit:
    """Give the leave that `permit` gave to another connection of its caller to the same place.

    Policy looks at everything of a flow but the caller's port; nothing else may differ, and it is
    for the caller to know that the policies are the same.

    Raises:
        ValueError: it is another flow.
    """
    before = permit.flow
    if (
        before is None
        or flow.destination != before.destination
        or flow.source_endpoint.ip != before.source_endpoint.ip
        or flow.source != before.source
    ):
        raise ValueError(f"{before} was permitted, not {flow}")
    return Permit(
        destination=permit.destination,
        flow=flow,
        policy=permit.policy,
        rule_number=permit.rule_number,
        notes=permit.notes,
        mint=_MINT,
    )


def authorize_outbound(destination: Endpoint, *, illegal: Container[int]) -> Permit | Refusal:
    """Judge an outbound connection to its original destination: only calls to ourselves fail."""
    if is_outbound_self_call(destination, illegal):
        return Refusal(destination=destination, flow=None, reason=SELF_CALL)
    return Permit(destination=destination, flow=None, mint=_MINT)


def _first_enforced(matching: list[Entry], action: Action) -> Entry | None:
    for entry in matching:
        if entry.policy.action is action and not entry.policy.dry_run:
            return entry
    return None


def _notes(matching: list[Entry], policies: PolicySet) -> tuple[str, ...]:
    """Say what the dry-run policies would have done, each policy once."""
    tried = dict.fromkeys(entry.policy for entry in matching if entry.policy.dry_run)
    notes = [f"dry-run: {policy.action.lower()} policy match: {policy.key}" for policy in tried]
    allows = any(policy.action is Action.ALLOW for policy in tried)
    if policies.has_dry_allow and not policies.has_allow and not allows:
        notes.append("dry-run: no allow policies match")
    return tuple(notes)


Miss = tuple[list[Failing], str, int]


def _misses(policy: Policy, flow: Flow) -> list[Miss]:
    """Return, for each rule, the fields in the way when each clause takes its best match."""
    return [
        ([field for clause in rule for field in _obstacles(clause, flow)], policy.key, number)
        for number, rule in enumerate(policy.rules[:EXPLAINED_RULES_MAX])
    ]


def _obstacles(clause: Clause, flow: Flow) -> list[Failing]:
    if not clause:
        return []
    shown = [match for match in clause if match != EMPTY][:EXPLAINED_RULES_MAX]
    attempts = (list(failing_fields(match, flow)) for match in shown)
    return min(attempts, key=len, default=[Failing("match", "empty", "at least one field")])
