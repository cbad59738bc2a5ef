"""Asking policy about a flow, and saying what it answered (dataplane.md 9.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.decide.authorize import NOT_ALLOWED, Permit, Refusal, authorize
from ztunnel.errors import DeniedError
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from ztunnel.model.flow import Flow
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import NodeContext
    from ztunnel.telemetry.access_log import Record

log = get("rbac")


def judge(node: NodeContext, flow: Flow, workload: Workload, record: Record) -> Permit:
    """Give leave to connect.

    Raises:
        DeniedError: policy refuses; the record then names the policy.
    """
    verdict = authorize(flow, node.store.policies.for_workload(workload))
    explain(node, verdict)
    if isinstance(verdict, Permit):
        return verdict
    if verdict.policy is not None:
        record.policy = verdict.policy.key
    text = f"connection closed due to policy rejection: {verdict.reason}"
    miss = verdict.nearest_miss
    raise DeniedError(f"{text} ({miss})" if miss else text)


def explain(node: NodeContext, verdict: Permit | Refusal) -> None:
    """Count the decision, and log it as the reference does."""
    action = "allow" if isinstance(verdict, Permit) else "deny"
    node.metrics.policy_decisions.count(action).add(1)
    wanted = Level.INFO if node.config.policy_info_logging else Level.DEBUG
    if not log.is_enabled(wanted):
        return
    say = log.info if wanted is Level.INFO else log.debug
    for note in verdict.notes:
        say(note)
    flow = verdict.flow
    assert flow is not None
    say(
        described(verdict),
        policy=None if verdict.policy is None else verdict.policy.key,
        source=str(flow.source_endpoint),
        identity=None if flow.source is None else str(flow.source),
        destination=str(flow.destination),
    )


def described(verdict: Permit | Refusal) -> str:
    """Name the decision in the reference's words."""
    match verdict:
        case Refusal(reason=reason):
            return "no allow policies matched" if reason == NOT_ALLOWED else "deny policy match"
        case Permit(policy=None):
            return "no allow policies, allow"
        case _:
            return "allow policy match"
