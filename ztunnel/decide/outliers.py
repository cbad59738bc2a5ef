"""Endpoints that could not be reached lately, and so are better left alone for a while.

The reference asks a dead endpoint again and again until the control plane takes it away
(state-and-xds.md 16.17). Here the first failed dial keeps it out of the choice for two seconds,
and each further one in a row for twice as long. It is out of the choice only, never unreachable:
with nothing else to choose it is chosen. One table belongs to one pod's proxy, so that no pod can
make another one avoid anything, and it is small, because it only has to hold what fails now.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from ztunnel.model.network import Endpoint, Network, Port
from ztunnel.model.workload import HBONE_PORT, TunnelProtocol, Workload
from ztunnel.state.addresses import address_key

FIRST_SECONDS = 2.0
MAX_SECONDS = 60.0
FORGIVEN_SECONDS = 60.0  # after that long without a failure the count begins anew
AVOIDED_MAX = 256
COUNT_MAX = 10  # more than enough for the longest time

Place: TypeAlias = tuple[int, int]  # an address as a number, and a port


@dataclass(slots=True)
class _Failures:
    """How often in a row dials to one place failed."""

    count: int = 0
    until: float = 0.0  # the end of the last time it was avoided


class Outliers:
    """What one proxy avoids. Times are seconds of any steady clock."""

    __slots__ = ("_avoided", "_ends", "_failures")

    def __init__(self) -> None:
        self._failures: OrderedDict[Place, _Failures] = OrderedDict()
        self._avoided: set[Place] = set()
        self._ends: list[tuple[float, Place]] = []  # a heap of when each may be chosen again

    def __bool__(self) -> bool:
        """Whether anything is avoided."""
        return bool(self._avoided)

    def failed(self, peer: Endpoint, now: float) -> None:
        """Note that a dial to this address and port failed.

        Dials that were under way when an earlier one failed are no further failures.
        """
        self.expire(now)
        place = _place(peer)
        if place in self._avoided:
            return
        failures = self._failures.setdefault(place, _Failures())
        self._failures.move_to_end(place)
        if now - failures.until > FORGIVEN_SECONDS:
            failures.count = 0
        failures.until = now + min(FIRST_SECONDS * 2.0**failures.count, MAX_SECONDS)
        failures.count = min(failures.count + 1, COUNT_MAX)
        self._avoided.add(place)
        heappush(self._ends, (failures.until, place))
        if len(self._failures) > AVOIDED_MAX:
            oldest, _ = self._failures.popitem(last=False)
            self._avoided.discard(oldest)
        if len(self._ends) > 2 * AVOIDED_MAX:  # most are of places that were evicted or reached
            self._ends = [(self._failures[one].until, one) for one in self._avoided]
            heapify(self._ends)

    def reached(self, peer: Endpoint) -> None:
        """Note that a dial succeeded: whatever was, this endpoint is well."""
        if self._failures:
            place = _place(peer)
            self._failures.pop(place, None)
            self._avoided.discard(place)

    def expire(self, now: float) -> None:
        """Let those be chosen again whose time is over; nearly free when there are none."""
        while self._ends and self._ends[0][0] <= now:
            _, place = heappop(self._ends)
            failures = self._failures.get(place)
            if failures is None or failures.until <= now:
                self._avoided.discard(place)

    def avoids(self, workload: Workload, port: Port, network: Network) -> bool:
        """Tell whether a caller in `network` should leave this port of an endpoint alone.

        One behind the gateway of another network is not dialled itself, but that gateway.
        """
        if not self._avoided:
            return False
        if workload.network != network and workload.network_gateway is not None:
            return False
        ports = (port, HBONE_PORT) if workload.protocol is TunnelProtocol.HBONE else (port,)
        return any(
            (address_key(ip), port) in self._avoided for ip in workload.ips for port in ports
        )


def _place(peer: Endpoint) -> Place:
    return address_key(peer.ip), peer.port
