"""Pick an endpoint of a service by health, locality and capacity (state-and-xds.md 10.4, 10.5).

The eligible endpoints for one kind of caller are listed once, and the list follows every change
(`pick_list`); a pick is one or two random numbers. Beyond the reference, what the caller's own
connections have shown (`feedback`) keeps picks away from endpoints that cannot be reached and,
where that is chosen, from busy ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ztunnel.decide.feedback import Feedback
from ztunnel.decide.pick_list import Judge, PickList
from ztunnel.model.network import Network, Port
from ztunnel.model.service import BalanceMode, Scope, Service
from ztunnel.model.settings import Balancing
from ztunnel.model.workload import Health, ServiceKey, Workload, WorkloadUid
from ztunnel.state.endpoints import Endpoints
from ztunnel.state.services import Services, accepts_unhealthy

# So many are compared one by one for the fewest connections; of more, two drawn at random, which
# is nearly as good ("the power of two choices") at a price that does not grow with their number.
COMPARED_MAX = 8
# Draws before all are looked at for one that is not avoided; few are avoided at any time.
DRAWS_MAX = 8

NOBODY: frozenset[WorkloadUid] = frozenset()


class Purpose(Enum):
    """What the endpoint is wanted for; a waypoint may serve ports its service does not declare."""

    STANDARD = auto()
    WAYPOINT = auto()


@dataclass(frozen=True, slots=True)
class Pick:
    """An endpoint and the port to use on it."""

    workload: Workload
    port: Port


@dataclass(slots=True, eq=False)
class _Question:
    """Who asks for which port of which service."""

    endpoints: Endpoints
    service: Service
    key: ServiceKey
    port: Port
    source: Workload
    caller: tuple[str, ...]  # where the caller is, for each preference

    def list(self, left_out: frozenset[WorkloadUid] = NOBODY) -> PickList:
        """Return the endpoints of the best rank among all but those left out."""
        return self.endpoints.follow(
            (self.port, self.source.network, self.caller, left_out),
            lambda: PickList(self._judge(left_out), self.endpoints.members.values()),
        )

    def target_port(self, workload: Workload) -> Port:
        """Return the port of one in the list."""
        port = _target_port(self.service, self.key, self.port, workload)
        assert port is not None, "without a port it is not eligible"
        return port

    def _judge(self, left_out: frozenset[WorkloadUid]) -> Judge:
        """Return what ranks endpoints: a closure, as it looks at thousands of them at a time."""
        service, key, port, caller = self.service, self.key, self.port, self.caller
        network = self.source.network
        takes_all = accepts_unhealthy(service)
        is_declared = port in service.ports  # a STANDARD port always is
        has_target = bool(service.ports.get(port))
        preferences = _preferences(service)
        wanted = len(preferences) if _mode(service) is BalanceMode.STRICT else 0

        def can_be_reached(one: Workload) -> bool:
            if one.health is not Health.HEALTHY and not takes_all:
                return False
            return bool(one.ips or one.hostname) or _is_behind_gateway(one, network)

        def has_port(one: Workload) -> bool:
            if not is_declared and one.application_tunnel is None:
                return False
            return has_target or _target_port(service, key, port, one) is not None

        def judge(one: Workload) -> int | None:
            if not can_be_reached(one) or not has_port(one) or one.uid in left_out:
                return None
            if not preferences:
                return 0
            met, rank = _rank(preferences, caller, one)
            return rank if met >= wanted else None

        return judge


def pick(
    services: Services,
    service: Service,
    port: Port,
    *,
    source: Workload,
    purpose: Purpose,
    rng: random.Random,
    feedback: Feedback | None = None,
) -> Pick | None:
    """Pick an endpoint of `service` for its `port`; None when none is eligible.

    Never an unhealthy one, unless the service's health policy is ALLOW_ALL; never one of
    capacity 0. One that `feedback` avoids only when there is no other.
    """
    if purpose is Purpose.STANDARD and port not in service.ports:
        return None
    key = service.key
    endpoints = services.endpoints_of(key)
    if not endpoints.members:
        return None
    preferences = _preferences(service)
    caller = tuple([_place(scope, source) for scope in preferences]) if preferences else ()
    question = _Question(endpoints, service, key, port, source, caller)
    found = question.list()
    if feedback is None:
        drawn = found.draw(rng)
    elif not feedback.outliers:
        drawn = _draw(found, feedback, rng)
    else:
        drawn = _draw_unavoided(question, found, feedback, rng)
    return None if drawn is None else Pick(drawn, question.target_port(drawn))


def _draw(found: PickList, feedback: Feedback, rng: random.Random) -> Workload | None:
    """Draw from a list in the way that the operator chose."""
    first = found.draw(rng)
    if first is None or feedback.balancing is Balancing.RANDOM:
        return first
    if len(found.workloads) <= COMPARED_MAX:
        return _least_busy(found.workloads, feedback, rng)
    second = found.draw(rng)
    assert second is not None
    return _least_busy((first, second), feedback, rng)


def _draw_unavoided(
    question: _Question, found: PickList, feedback: Feedback, rng: random.Random
) -> Workload | None:
    """Draw one that is not avoided, from a lower rank if need be, else one that is."""

    def is_avoided(one: Workload) -> bool:
        port = question.target_port(one)
        return feedback.outliers.avoids(one, port, question.source.network)

    drawn = None
    for _ in range(DRAWS_MAX):
        drawn = _draw(found, feedback, rng)
        if drawn is None or not is_avoided(drawn):
            return drawn
    left_out = NOBODY
    while True:
        avoided = frozenset([one.uid for one in found.workloads if is_avoided(one)])
        left = [one for one in found.workloads if one.capacity and one.uid not in avoided]
        if left and feedback.balancing is Balancing.LEAST_CONNECTIONS:
            return _least_busy(left, feedback, rng)
        if left:
            return rng.choices(left, [one.capacity for one in left])[0]
        if not avoided:
            return drawn
        left_out |= avoided
        found = question.list(left_out)


def _least_busy(there: Sequence[Workload], feedback: Feedback, rng: random.Random) -> Workload:
    """Return one with the fewest connections for its capacity, any of them if there are several."""
    loads = [feedback.load(one) for one in there]
    least = min(loads)
    return rng.choice([one for one, load in zip(there, loads, strict=True) if load == least])


def _is_behind_gateway(workload: Workload, network: Network) -> bool:
    return workload.network != network and workload.network_gateway is not None


def target_port(service: Service, port: Port, workload: Workload) -> Port | None:
    """Translate a service port to the workload's port; None when there is none.

    The endpoint's own mapping, else the service's, else, for an application tunnel with a port
    of its own, the service port itself.
    """
    return _target_port(service, service.key, port, workload)


def _target_port(service: Service, key: ServiceKey, port: Port, workload: Workload) -> Port | None:
    own = workload.services.get(key)
    if own is not None and (mapped := own.get(port)):
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
    preferences: tuple[Scope, ...], caller: tuple[str, ...], endpoint: Workload
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
