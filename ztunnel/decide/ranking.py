"""Who of a service's endpoints is eligible for one kind of caller, and how near to it.

How it works (state-and-xds.md 10.4, 10.5): thousands are looked at when a service is first asked
about, so each question is put to all of them before the next one. That is five times as fast as
all questions to one of them after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter

from ztunnel.model.network import Network, Port
from ztunnel.model.service import BalanceMode, Scope, Service
from ztunnel.model.workload import Health, ServiceKey, Workload
from ztunnel.state.services import accepts_unhealthy

# Where a workload is, as seen at one scope.
_PLACES: Mapping[Scope, Callable[[Workload], str]] = {
    Scope.REGION: attrgetter("locality.region"),
    Scope.ZONE: attrgetter("locality.zone"),
    Scope.SUBZONE: attrgetter("locality.subzone"),
    Scope.NODE: attrgetter("node"),
    Scope.CLUSTER: attrgetter("cluster_id"),
    Scope.NETWORK: attrgetter("network"),
}


class Ranking:
    """Ranks endpoints of `service` for callers at `caller` (`places`) that want `port`."""

    __slots__ = ("_caller", "_key", "_network", "_port", "_service")

    def __init__(
        self, service: Service, port: Port, network: Network, caller: tuple[str, ...]
    ) -> None:
        self._service = service
        self._key = service.key
        self._port = port
        self._network = network
        self._caller = caller

    def sort(self, workloads: Iterable[Workload]) -> dict[int, list[Workload]]:
        """Give those that are eligible by their ranks; more is better, and none is empty.

        A rank tells how many leading preferences are met. Network as the first preference splits
        the endpoints in two groups, ours before all others, each ranked by the other preferences.
        """
        there = self._eligible(workloads)
        preferences = preferences_of(self._service)
        if not preferences:
            return {0: there} if there else {}
        steps = list(zip(preferences, self._caller, strict=True))
        ranked: dict[int, list[Workload]] = {}
        if preferences[0] is Scope.NETWORK:
            near, rest = _split(there, *steps.pop(0))
            _walk(near, steps, len(preferences), ranked)
            _walk(rest, steps, 0, ranked)
            wanted = len(preferences) + len(steps)
        else:
            _walk(there, steps, 0, ranked)
            wanted = len(steps)
        if mode_of(self._service) is not BalanceMode.STRICT:
            return ranked
        return {wanted: ranked[wanted]} if wanted in ranked else {}

    def _eligible(self, workloads: Iterable[Workload]) -> list[Workload]:
        service, key, port, network = self._service, self._key, self._port, self._network
        takes_all, healthy = accepts_unhealthy(service), Health.HEALTHY
        there = [
            one
            for one in workloads
            if (takes_all or one.health is healthy)
            and (one.ips or one.hostname or is_behind_gateway(one, network))
        ]
        if service.ports.get(port):
            return there
        if port not in service.ports:  # only a waypoint is asked for one
            there = [one for one in there if one.application_tunnel is not None]
        return [one for one in there if target_port(service, key, port, one) is not None]


def target_port(service: Service, key: ServiceKey, port: Port, workload: Workload) -> Port | None:
    """Translate a port of the service, whose key is `key`, to the workload's; None without one.

    The endpoint's own mapping, else the service's, else, for an application tunnel with a port
    of its own, the service port itself.
    """
    own = workload.services.get(key)
    if own is not None and (mapped := own.get(port)):
        return mapped
    if target := service.ports.get(port):
        return target
    tunnel = workload.application_tunnel
    return port if tunnel is not None and tunnel.port else None


def is_behind_gateway(workload: Workload, network: Network) -> bool:
    """Tell whether a caller in `network` reaches the workload through the gateway of another."""
    return workload.network != network and workload.network_gateway is not None


def mode_of(service: Service) -> BalanceMode:
    """Return how endpoints of this service are chosen."""
    balancer = service.load_balancer
    return balancer.mode if balancer is not None else BalanceMode.STANDARD


def preferences_of(service: Service) -> tuple[Scope, ...]:
    """Return the locality preferences that count in the service's mode."""
    if mode_of(service) not in (BalanceMode.STRICT, BalanceMode.FAILOVER):
        return ()
    assert service.load_balancer is not None
    return service.load_balancer.routing_preferences


def places(service: Service, source: Workload) -> tuple[str, ...]:
    """Return where a caller is, as seen at each preference of the service."""
    preferences = preferences_of(service)
    return tuple([_PLACES[scope](source) for scope in preferences]) if preferences else ()


def _walk(
    there: list[Workload],
    steps: list[tuple[Scope, str]],
    rank: int,
    ranked: dict[int, list[Workload]],
) -> None:
    """Note the rank of each: `rank`, and one more for each step until the first it fails."""
    for scope, wanted in steps:
        if not there:
            return
        there, rest = _split(there, scope, wanted)
        if rest:
            ranked[rank] = rest
        rank += 1
    if there:
        ranked[rank] = there


def _split(
    there: list[Workload], scope: Scope, wanted: str
) -> tuple[list[Workload], list[Workload]]:
    """Tell those that are at this place from those that are not."""
    seen = list(map(_PLACES[scope], there))
    if seen.count(wanted) == len(seen):
        return there, []
    near = [one for one, place in zip(there, seen, strict=True) if place == wanted]
    return near, [one for one, place in zip(there, seen, strict=True) if place != wanted]
