"""What becomes of this node's pods, for people (`ztunnel-cni-agent status`)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cni.agent.eligibility import Decision
from cni.agent.enrol import State
from cni.agent.reconcile import Reconciler
from cni.agent.view import ClusterView
from ztunnel.model.workload import PodUid

OUTSIDE = "outside"


class PodStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One pod."""

    namespace: str
    name: str
    uid: str
    state: str
    reason: str = ""
    annotation: str = ""
    ips: list[str] = []
    repairs: int = 0
    netns: int | None = None  # inode


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The node."""

    node: str
    ready: bool
    waiting_for: list[str]
    proxies: int
    api_silent_seconds: float | None
    pods: list[PodStatus]


@dataclass(frozen=True, slots=True)
class StatusReader:
    """Collects it."""

    view: ClusterView
    reconciler: Reconciler

    def pods(self) -> list[PodStatus]:
        """List all pods of the node, by name."""
        found = [self._pod(uid) for uid in self._uids()]
        return sorted(found, key=lambda pod: (pod.namespace, pod.name, pod.uid))

    def _uids(self) -> set[PodUid]:
        return {pod.uid for pod in self.view.pods} | set(self.reconciler.enrolments)

    def _pod(self, uid: PodUid) -> PodStatus:
        pod = self.view.pod(uid)
        enrolment = self.reconciler.enrolments.get(uid)
        verdict = self.reconciler.verdict(pod) if pod is not None else None
        state, reason = OUTSIDE, str(verdict.reason) if verdict else ""
        if enrolment is not None:
            state, reason = enrolment.state.value, enrolment.reason
        elif verdict is not None and verdict.decision is Decision.IN:
            state, reason = State.WAITING.value, "not looked at yet"
        netns = enrolment.netns if enrolment is not None else None
        named = pod or enrolment
        return PodStatus(
            namespace=named.namespace if named else "",
            name=named.name if named else "",
            uid=uid,
            state=state,
            reason=reason,
            annotation=(pod.status or "") if pod else "",
            ips=[str(ip) for ip in (enrolment.ips if enrolment else pod.ips if pod else ())],
            repairs=enrolment.repairs if enrolment else 0,
            netns=netns.id.inode if netns is not None else None,
        )


def show(status: AgentStatus) -> str:
    """Print a status as a table."""
    contact = (
        "never heard" if status.api_silent_seconds is None else f"{status.api_silent_seconds:.0f} s"
    )
    head = [
        f"node {status.node}: {'ready' if status.ready else 'not ready'}"
        + (f", waiting for {', '.join(status.waiting_for)}" if status.waiting_for else ""),
        f"node proxies connected: {status.proxies}; Kubernetes API silent for: {contact}",
        "",
    ]
    rows = [("POD", "STATE", "ANNOTATION", "IPS", "REPAIRS", "REASON")]
    for pod in status.pods:
        name = f"{pod.namespace}/{pod.name}" if pod.name else pod.uid
        ips, repairs = ",".join(pod.ips), str(pod.repairs)
        rows.append((name, pod.state, pod.annotation or "-", ips or "-", repairs, pod.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]
    return "\n".join([*head, *(line.rstrip() for line in lines)]) + "\n"
