"""Ways that were found before: what the same question would be answered again.

Finding the way to a workload, naming both ends and making the pool's key costs a third of what a
new connection through a pooled tunnel costs. The answer depends on nothing but the question and the
state, unless an endpoint is chosen among several; those answers are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.decide.route import Hop
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.proxy.labels import Description
    from ztunnel.transport.pool import PoolKey

WAYS_MAX = 128  # a kibibyte each, and a node has hundreds of pods


@dataclass(slots=True)
class Way:
    """A hop, and what was derived from it."""

    hop: Hop
    source_ip: IpAddress
    description: Description | None = None
    key: PoolKey | None = None


class Ways:
    """The ways of one workload, true for one version of the state."""

    __slots__ = ("_by_target", "_version")

    def __init__(self) -> None:
        self._version = -1
        self._by_target: dict[Endpoint, Way] = {}

    def find(self, target: Endpoint, source_ip: IpAddress, version: int) -> Way | None:
        """Give the way to `target` that was kept under this version of the state."""
        if version != self._version:
            self._by_target.clear()
            self._version = version
            return None
        way = self._by_target.get(target)
        return way if way is not None and way.source_ip == source_ip else None

    def keep(self, target: Endpoint, way: Way) -> None:
        """Keep a way if the same question has this answer only: no choice was made."""
        if way.hop.service is None and way.hop.peer.ip == target.ip:
            if len(self._by_target) >= WAYS_MAX:
                self._by_target.clear()
            self._by_target[target] = way
