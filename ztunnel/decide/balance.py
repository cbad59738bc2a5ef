"""Pick an endpoint of a service by health, locality and capacity (state-and-xds.md 10.4, 10.5).

The eligible endpoints for one kind of caller are listed once and remembered until an endpoint or
the service changes; after that a pick is one random number and one binary search.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate

from ztunnel.model.network import Port
from ztunnel.model.service import BalanceMode, Scope, Service
from ztunnel.model.workload import Workload
from ztunnel.state.services import Services


class Purpose(Enum):
    """What the endpoint is wanted for; a waypoint may serve ports its service does not declare."""

    STANDARD = auto()
    WAYPOINT = auto()


@dataclass(frozen=True, slots=True)
class Pick:
    """An endpoint and the port to use on it."""

    workload: Workload
    port: Port


@dataclass(frozen=True, slots=True)
class _PickList:
    """The endpoints of the best rank, with running totals of their capacities."""

    picks: tuple[Pick, ...]
    totals: tuple[int, ...]

    def draw(self, rng: random.Random) -> Pick | None:
        if not self.totals or not self.totals[-1]:
            return None
        return self.picks[bisect_right(self.totals, rng.randrange(self.totals[-1]))]


def pick(
    services: Services,
    service: Service,
    port: Port,
    *,
    source: Workload,
    purpose: Purpose,
    rng: random.Random,
) -> Pick | None:
    """Pick an endpoint of `service` for its `port`; None when none is eligible.

    Never an unhealthy one, unless the service's health policy is ALLOW_ALL; never one of
    capacity 0.
    """
    if purpose is Purpose.STANDARD and port not in service.ports:
        return None
    endpoints = services.endpoints_of(service.key)
    if not endpoints.members:
        return None
    preferences = _preferences(service)
    caller = tuple(_place(scope, source) for scope in preferences)
    found = endpoints.remember(
        (port, source.network, caller),
        lambda: _list(
            service,
            _eligible(services.endpoints(service), service, port, source=source),
            caller=caller,
        ),
    )
    assert isinstance(found, _PickList)
    return found.draw(rng)


def _list(service: Service, picks: Iterable[Pick], *, caller: tuple[object, ...]) -> _PickList:
    """Keep the picks of the highest rank; STRICT wants all preferences met."""
    preferences = _preferences(service)
    wanted = len(preferences) if _mode(service) is BalanceMode.STRICT else 0
    best: list[Pick] = []
    best_rank = 0
    for candidate in picks:
        met, rank = _rank(preferences, caller, candidate.workload)
        if met < wanted:
            continue
        if not best or rank > best_rank:
            best, best_rank = [candidate], rank
        elif rank == best_rank:
            best.append(candidate)
    totals = accumulate(candidate.workload.capacity for candidate in best)
    return _PickList(tuple(best), tuple(totals))


def _eligible(
    endpoints: Iterable[Workload],
    service: Service,
    port: Port,
    *,
    source: Workload,
) -> Iterable[Pick]:
    """Yield the endpoints that can be reached and that have a port for this service port."""
    for workload in endpoints:
        if not (workload.ips or workload.hostname or _is_behind_gateway(workload, source)):
            continue
        is_declared = port in service.ports  # a STANDARD port always is
        if not is_declared and workload.application_tunnel is None:
            continue
        target = target_port(service, port, workload)
        if target is not None:
            yield Pick(workload, target)


def _is_behind_gateway(workload: Workload, source: Workload) -> bool:
    return workload.network != source.network and workload.network_gateway is not None


def target_port(service: Service, port: Port, workload: Workload) -> Port | None:
    """Translate a service port to the workload's port; None when there is none.

    The endpoint's own mapping, else the service's, else, for an application tunnel with a port
    of its own, the service port itself.
    """
    if mapped := workload.services.get(service.key, {}).get(port):
        return mapped
    if target := service.ports.get(port):
        return target
    tunnel = workload.application_tunnel
    return port if tunnel is not None and tunnel.port else None


def _mode(service: Service) -> BalanceMode:
    balancer = service.load_balancer
    return balancer.mode if balancer is not None else BalanceMode.STANDARD


def _preferences(service: Service) -> tuple[Scope, ...]:
    """Return the locality preferences that count in the service's mode."""
    if _mode(service) not in (BalanceMode.STRICT, BalanceMode.FAILOVER):
        return ()
    assert service.load_balancer is not None
    return service.load_balancer.routing_preferences


def _place(scope: Scope, workload: Workload) -> str:
    """Return where the workload is, as seen at one scope."""
    match scope:
        case Scope.REGION:
            return workload.locality.region
        case Scope.ZONE:
            return workload.locality.zone
        case Scope.SUBZONE:
            return workload.locality.subzone
        case Scope.NODE:
            return workload.node
        case Scope.CLUSTER:
            return workload.cluster_id
        case Scope.NETWORK:
            return workload.network


def _rank(
    preferences: tuple[Scope, ...], caller: tuple[object, ...], endpoint: Workload
) -> tuple[int, int]:
    """Return how many leading preferences are met, and that plus the network bonus.

    Network as the first preference splits the endpoints in two groups, ours before all others,
    each ordered by the remaining preferences.
    """
    met = bonus = 0
    for position, (scope, wanted) in enumerate(zip(preferences, caller, strict=True)):
        is_network_first = position == 0 and scope is Scope.NETWORK
        if _place(scope, endpoint) == wanted:
            met += 1
            bonus += len(preferences) - 1 if is_network_first else 0
        elif not is_network_first:
            break
    return met, met + bonus
