"""Ways that were found before: what the same question would be answered again.

Finding the way to a workload, naming both ends and making the pool's key costs a third of what a
new connection through a pooled tunnel costs. The answer depends on nothing but the question and the
state, unless an endpoint is chosen among several: that is done anew each time, and only what
follows from a choice is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.decide.route import Hop
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.proxy.labels import Description
    from ztunnel.transport.pool import PoolKey
    from ztunnel.wire.hbone.events import Headers

WAYS_MAX = 128  # a kibibyte each, and a node has hundreds of pods


@dataclass(slots=True)
class Way:
    """A hop, and what was derived from it."""

    hop: Hop
    source_ip: IpAddress
    permit: Permit | None = None  # to call the target that it leads to
    head: Headers | None = None  # of the request for a tunnel
    description: Description | None = None
    key: PoolKey | None = None


class Ways:
    """The ways of one workload, true for one version of the state."""

    __slots__ = ("_by_choice", "_by_target", "_version")

    def __init__(self) -> None:
        self._version = -1
        self._by_target: dict[Endpoint, Way] = {}
        self._by_choice: dict[tuple[Endpoint, Endpoint], Way] = {}

    def find(self, target: Endpoint, source_ip: IpAddress, version: int) -> Way | None:
        """Give the way to `target` that was kept under this version of the state."""
        if version != self._version:
            self._by_target.clear()
            self._by_choice.clear()
            self._version = version
            return None
        way = self._by_target.get(target)
        return way if way is not None and way.source_ip == source_ip else None

    def keep(self, target: Endpoint, way: Way) -> Way:
        """Keep a way; give the one to go, which is that of an earlier connection if it is the same.

        If a choice was made the same question may have another answer next time.
        """
        hop = way.hop
        if hop.service is None and hop.peer.ip == target.ip:
            before = self._by_target.get(target)
            if before is not None and before.hop == hop:
                # Who speaks from another address goes the same way, and under the same names.
                way.hop, way.description = before.hop, before.description
            if len(self._by_target) >= WAYS_MAX:
                self._by_target.clear()
            self._by_target[target] = way
            return way
        choice = target, hop.peer
        before = self._by_choice.get(choice)
        if before is not None and before.source_ip == way.source_ip and before.hop == hop:
            return before
        if len(self._by_choice) >= WAYS_MAX:
            self._by_choice.clear()
        self._by_choice[choice] = way
        return way
