"""Pick an endpoint of a service by health, locality and capacity (state-and-xds.md 10.4, 10.5).

The eligible endpoints for one kind of caller are listed once, and the list follows every change
(`pick_list`); a pick is one or two random numbers. Beyond the reference, what the caller's own
connections have shown (`feedback`) keeps picks away from endpoints that cannot be reached and,
where that is chosen, from busy ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from ztunnel.decide.feedback import Feedback
from ztunnel.decide.pick_list import Lot, PickList
from ztunnel.decide.ranking import Ranking, places, target_port
from ztunnel.model.network import Network, Port
from ztunnel.model.service import Service
from ztunnel.model.settings import Balancing
from ztunnel.model.workload import Workload
from ztunnel.state.services import Services

# So many are compared one by one for the fewest connections; of more, two drawn at random, which
# is nearly as good ("the power of two choices") at a price that does not grow with their number.
COMPARED_MAX = 8
# Draws before all are looked at for one that is not avoided; few are avoided at any time.
DRAWS_MAX = 8


class Purpose(Enum):
    """What the endpoint is wanted for; a waypoint may serve ports its service does not declare."""

    STANDARD = auto()
    WAYPOINT = auto()


@dataclass(frozen=True, slots=True)
class Pick:
    """An endpoint and the port to use on it."""

    workload: Workload
    port: Port


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
    key, network = service.key, source.network
    endpoints = services.endpoints_of(key)
    if not endpoints.members:
        return None
    caller = places(service, source)
    question = port, network, caller
    listed = endpoints.followed(question)
    if listed is None:
        ranking = Ranking(service, port, network, caller)
        listed = PickList(ranking.sort, endpoints.members.values())
        endpoints.follow(question, listed)
    assert isinstance(listed, PickList)
    if feedback is None:
        drawn = listed.best.draw(rng)
    elif not feedback.outliers:
        drawn = _draw(listed.best, feedback, rng)
    else:
        avoids = partial(_avoids, feedback, service, port, network)
        drawn = _draw_unavoided(listed, avoids, feedback, rng)
    if drawn is None:
        return None
    target = target_port(service, key, port, drawn)
    assert target is not None, "without a port it is not eligible"
    return Pick(drawn, target)


def _avoids(
    feedback: Feedback, service: Service, port: Port, network: Network, one: Workload
) -> bool:
    target = target_port(service, service.key, port, one)
    assert target is not None, "without a port it is not eligible"
    return feedback.outliers.avoids(one, target, network)


def _draw(found: Lot, feedback: Feedback, rng: random.Random) -> Workload | None:
    """Draw in the way that the operator chose."""
    first = found.draw(rng)
    if first is None or feedback.balancing is Balancing.RANDOM:
        return first
    if len(found) <= COMPARED_MAX:
        return _least_busy(list(found), feedback, rng)
    second = found.draw(rng)
    assert second is not None
    return _least_busy((first, second), feedback, rng)


def _draw_unavoided(
    listed: PickList,
    avoids: Callable[[Workload], bool],
    feedback: Feedback,
    rng: random.Random,
) -> Workload | None:
    """Draw one that is not avoided, from a lower rank if need be, else one that is."""
    drawn = None
    for _ in range(DRAWS_MAX):
        drawn = _draw(listed.best, feedback, rng)
        if drawn is None or not avoids(drawn):
            return drawn
    for lot in listed.by_rank():
        others = [one for one in lot if not avoids(one)]
        left = [one for one in others if one.capacity]
        if left and feedback.balancing is Balancing.LEAST_CONNECTIONS:
            return _least_busy(left, feedback, rng)
        if left:
            return rng.choices(left, [one.capacity for one in left])[0]
        if others:
            break
    return drawn


def _least_busy(there: Sequence[Workload], feedback: Feedback, rng: random.Random) -> Workload:
    """Return one with the fewest connections for its capacity, any of them if there are several."""
    loads = [feedback.load(one) for one in there]
    least = min(loads)
    return rng.choice([one for one, load in zip(there, loads, strict=True) if load == least])
