"""What a pod's own connections show about endpoints, for the next choice among them.

How the shell uses it, one for each pod's proxy:

    feedback.outliers.expire(now)               before it routes
    route(..., feedback=feedback)
    feedback.outliers.failed(hop.peer, now)     a dial to the next hop failed
    feedback.outliers.reached(hop.peer)         it succeeded
    feedback.begun(hop.workload)                a connection was opened to it,
    feedback.ended(hop.workload)                and is over: exactly once for each `begun`
"""

from __future__ import annotations

from ztunnel.decide.outliers import Outliers
from ztunnel.model.settings import Balancing
from ztunnel.model.workload import Workload, WorkloadUid


class Feedback:
    """Failed dials and live connections of one proxy."""

    __slots__ = ("_live", "balancing", "outliers")

    def __init__(self, balancing: Balancing = Balancing.RANDOM) -> None:
        self.balancing = balancing
        self.outliers = Outliers()
        self._live: dict[WorkloadUid, int] = {}

    def begun(self, workload: Workload) -> None:
        """Count a connection to this endpoint."""
        if self.balancing is Balancing.LEAST_CONNECTIONS:
            self._live[workload.uid] = self._live.get(workload.uid, 0) + 1

    def ended(self, workload: Workload) -> None:
        """Count it no longer."""
        if self.balancing is Balancing.LEAST_CONNECTIONS:
            left = self._live[workload.uid] - 1
            if left:
                self._live[workload.uid] = left
            else:
                del self._live[workload.uid]

    def live(self, workload: Workload) -> int:
        """How many connections to this endpoint are open."""
        return self._live.get(workload.uid, 0)

    def load(self, workload: Workload) -> float:
        """How busy the endpoint would be with one connection more, for its capacity."""
        return (self.live(workload) + 1) / workload.capacity if workload.capacity else float("inf")
