"""Which waypoint a service has, and whether somebody is it (dataplane.md 2.4)."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from ztunnel.decide.upstream import refers_to
from ztunnel.model.network import IpAddress
from ztunnel.model.service import Service
from ztunnel.model.workload import GatewayAddress, Workload
from ztunnel.state.store import Store


def choose_waypoint(service: Service, rng: random.Random) -> GatewayAddress | None:
    """Return the service's waypoint for one connection; several are drawn by weight."""
    totals = tuple(accumulate(choice.weight for choice in service.weighted_waypoints))
    if totals and totals[-1] > 0:
        drawn = bisect_right(totals, rng.randrange(totals[-1]))
        return service.weighted_waypoints[drawn].destination
    return service.waypoint


def waypoints_of(owner: Service | Workload) -> Iterator[GatewayAddress]:
    """Yield every waypoint the owner may be reached through."""
    if owner.waypoint is not None:
        yield owner.waypoint
    if isinstance(owner, Service):
        yield from (choice.destination for choice in owner.weighted_waypoints if choice.weight)


def is_waypoint_of(
    store: Store, owner: Service | Workload, source: Workload, source_ip: IpAddress
) -> bool:
    """Tell whether the sender is a waypoint of `owner` itself: same identity, own address."""
    namesake = store.workloads.by_address(source.network, source_ip)
    for candidate in (source, namesake):
        if candidate is None or candidate.identity != source.identity:
            continue
        if source_ip in candidate.ips and any(
            refers_to(store, waypoint, candidate) for waypoint in waypoints_of(owner)
        ):
            return True
    return False
