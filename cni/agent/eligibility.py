"""Which pods are in the mesh (cni.md 3.3). Pure.

One answer for everybody who asks: the plugin's event, a change, the start. The reference applies
some of the conditions in some of these places only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from cni.agent.objects import KubePod
from cni.agent.selectors import DEFAULT_ENABLEMENTS, Enablement

SIDECAR_ANNOTATION = "sidecar.istio.io/status"
PROXY_LABEL = ("app", "ztunnel")


class Decision(Enum):
    """Whether a pod belongs into the mesh."""

    IN = "in"
    OUT = "out"
    UNKNOWN = "unknown"  # leave it as it is, and let nobody start before we know


class Reason(StrEnum):
    """Why."""

    SELECTED = "selected"
    NOT_SELECTED = "no selector matches"
    HOST_NETWORK = "uses the host's network"
    SIDECAR = "has a sidecar"
    OVER = "has run to its end"
    EXCLUDED = "its namespace is excluded"
    PROXY = "is a node proxy"
    NAMESPACE_UNKNOWN = "its namespace is not known yet"


_DECISIONS = {Reason.SELECTED: Decision.IN, Reason.NAMESPACE_UNKNOWN: Decision.UNKNOWN}


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer with its reason."""

    reason: Reason

    @property
    def decision(self) -> Decision:
        """The answer."""
        return _DECISIONS.get(self.reason, Decision.OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligibility:
    """What the operator chose."""

    enablements: tuple[Enablement, ...] = DEFAULT_ENABLEMENTS
    excluded_namespaces: frozenset[str] = frozenset()
    system_namespace: str = "istio-system"

    def judge(self, pod: KubePod, namespace_labels: Mapping[str, str] | None) -> Verdict:
        """Decide about a pod; None: the labels of its namespace are not known."""
        return Verdict(self._reason(pod, namespace_labels))

    def _reason(self, pod: KubePod, namespace_labels: Mapping[str, str] | None) -> Reason:
        barrier = self._barrier(pod)
        if barrier is not None:
            return barrier
        if namespace_labels is None:
            return Reason.NAMESPACE_UNKNOWN
        if any(item.matches(pod.labels, namespace_labels) for item in self.enablements):
            return Reason.SELECTED
        return Reason.NOT_SELECTED

    def _barrier(self, pod: KubePod) -> Reason | None:
        """Say what keeps a pod out whatever its labels; None if nothing does."""
        key, value = PROXY_LABEL
        barriers = {
            Reason.HOST_NETWORK: pod.host_network,
            Reason.EXCLUDED: pod.namespace in self.excluded_namespaces,
            Reason.OVER: pod.is_over,
            Reason.SIDECAR: SIDECAR_ANNOTATION in pod.annotations,
            Reason.PROXY: pod.namespace == self.system_namespace and pod.labels.get(key) == value,
        }
        return next((reason for reason, holds in barriers.items() if holds), None)
