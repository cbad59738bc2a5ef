"""Where an outbound connection goes next, how, and whom to expect there (dataplane.md 2.2).

How it works. An address is a service's, a workload's, or nobody's. A service's waypoint comes
first, then an endpoint; a workload's waypoint counts only when the workload itself was addressed.
Whatever was chosen may be in another network, which costs one more tunnel through that network's
gateway. An address nobody owns is passed through as plain TCP. Nothing here falls back from a
tunnel to plaintext.

An answer that lacks data says what it lacks (`UnknownAddress`, `ResolveHostname`): the caller
finds out and asks again. Two deliberate differences from the reference: an address that is both a
service's and a workload's is looked up the same way throughout, and a service's own waypoint is
not sent back to itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from ztunnel.decide.balance import Purpose
from ztunnel.decide.feedback import Feedback
from ztunnel.decide.upstream import (
    Upstream,
    at_address,
    at_gateway,
    choose_ip,
    family_hint,
    is_passthrough,
    of_service,
)
from ztunnel.decide.waypoint import choose_waypoint, is_waypoint_of
from ztunnel.errors import RouteError
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint, HostPort, IpAddress, Network
from ztunnel.model.service import Service
from ztunnel.model.workload import (
    HBONE_PORT,
    GatewayAddress,
    NamespacedHostname,
    TunnelProtocol,
    Workload,
)
from ztunnel.state.store import Store


class HopProtocol(StrEnum):
    """How the next hop is reached; values are those of the connection dump."""

    TCP = "TCP"
    HBONE = "HBONE"
    DOUBLE_HBONE = "DOUBLEHBONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundRequest:
    """Who calls, from which of its addresses, and where it meant to go."""

    source: Workload
    source_ip: IpAddress
    target: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Dial `peer`; in a tunnel, ask for `authority` and accept only `expected`.

    `workload` is who takes the connection next (the waypoint, if there is one), or None when
    nobody is known; `service` is the one originally addressed, for telemetry. `inner_expected`
    is for the inner tunnel of a double one. `ignored_names` are names the service vouches for
    that are not identities: worth a warning.
    """

    protocol: HopProtocol
    peer: Endpoint
    authority: Endpoint | HostPort | None = None
    expected: tuple[Identity, ...] = ()
    inner_expected: tuple[Identity, ...] = ()
    workload: Workload | None = None
    service: Service | None = None
    passthrough: bool = False
    ignored_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnknownAddress:
    """We were never told about `what`: fetch this resource name, then ask again.

    It is `network/ip` or `namespace/hostname`.
    """

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveHostname:
    """The chosen workload has only a DNS name: resolve it, then call `resolved`."""

    workload: Workload
    hostname: str
    target: IpAddress  # whose family is preferred
    hop_at: Callable[[IpAddress], Hop]

    def resolved(self, addresses: Sequence[IpAddress], rng: random.Random) -> Hop:
        """Return the hop to one of `addresses`, of the target's family if there is one.

        Raises:
            RouteError: there are no addresses.
        """
        if not addresses:
            raise RouteError(
                f"ip addresses were resolved for workload {self.workload.uid}, "
                "but valid dns response had no A/AAAA records"
            )
        same_family = [ip for ip in addresses if ip.version == self.target.version]
        return self.hop_at(rng.choice(same_family or addresses))

    def failed(self) -> RouteError:
        """Return the error to end with when the name could not be resolved."""
        return RouteError(f"no ip addresses were resolved for workload: {self.workload.uid}")


Route: TypeAlias = Hop | UnknownAddress | ResolveHostname


@dataclass(frozen=True, slots=True, kw_only=True)
class _Journey:
    """One question with all that the answer may look at."""

    source: Workload
    source_ip: IpAddress
    target: Endpoint
    store: Store
    rng: random.Random
    feedback: Feedback | None
    may_fetch: bool
    fetched: Collection[str]

    def lacks(self, what: str) -> bool:
        """Tell whether `what` should be fetched before we answer without it."""
        return self.may_fetch and what not in self.fetched


def route(
    request: OutboundRequest,
    store: Store,
    *,
    network: Network,
    rng: random.Random,
    on_demand: bool = False,
    fetched: Collection[str] = (),
    feedback: Feedback | None = None,
) -> Route:
    """Decide where a connection goes next.

    `network` is our own. With `on_demand` unknown addresses are answered by `UnknownAddress`,
    unless they are in `fetched`: those were asked for already and do not exist. `feedback` is what
    the caller's earlier connections have shown about endpoints.

    Raises:
        RouteError: the connection must be dropped; the text is for the operator.
    """
    journey = _Journey(
        source=request.source,
        source_ip=request.source_ip,
        target=request.target,
        store=store,
        rng=rng,
        feedback=feedback,
        may_fetch=on_demand,
        fetched=fetched,
    )
    ip = request.target.ip
    service = store.services.by_vip(network, ip, request.source.namespace)
    workload = store.workloads.by_address(network, ip)
    if service is None and workload is None and journey.lacks(what := f"{network}/{ip}"):
        return UnknownAddress(what)
    if service is not None:
        return _to_service(journey, service, workload)
    upstream = at_address(
        store,
        request.source.network,
        request.target,
        source=request.source,
        purpose=Purpose.STANDARD,
        rng=rng,
        feedback=feedback,
    )
    if upstream is None:
        return _pass_through(request.target, None)
    return _to_workload(journey, upstream)


def _to_service(journey: _Journey, service: Service, workload: Workload | None) -> Route:
    """Route a connection to a VIP; `workload` is set if the address is also a workload's."""
    waypoint = choose_waypoint(service, journey.rng)
    if waypoint is not None and not is_waypoint_of(
        journey.store, service, journey.source, journey.source_ip
    ):
        return _through_waypoint(journey, waypoint, service)
    if workload is not None and journey.target.port not in service.ports:
        return _to_workload(journey, Upstream(workload, journey.target.port))
    upstream = of_service(
        journey.store,
        service,
        journey.target.port,
        source=journey.source,
        purpose=Purpose.STANDARD,
        rng=journey.rng,
        feedback=journey.feedback,
    )
    if upstream is not None:
        # The workload's own waypoint is passed by, unless the workload itself was addressed too.
        if workload is not None:
            return _to_workload(journey, upstream)
        return _direct(journey, upstream, service)
    if is_passthrough(service):
        return _pass_through(journey.target, service)
    raise RouteError(f"no healthy upstream: {journey.target}")


def _to_workload(journey: _Journey, upstream: Upstream) -> Route:
    """Route to an addressed workload: through its waypoint, unless the sender is that."""
    waypoint = upstream.workload.waypoint
    if waypoint is None or upstream.workload.network != journey.source.network:
        return _direct(journey, upstream, upstream.service)
    if is_waypoint_of(journey.store, upstream.workload, journey.source, journey.source_ip):
        return _direct(journey, upstream, upstream.service)
    return _through_waypoint(journey, waypoint, upstream.service)


def _through_waypoint(
    journey: _Journey, reference: GatewayAddress, service: Service | None
) -> Route:
    """Tunnel to a waypoint, which is asked for the original target.

    A waypoint that cannot be found ends the connection: it is never passed by.
    """
    upstream = _find_gateway(journey, reference, Purpose.WAYPOINT)
    if isinstance(upstream, UnknownAddress):
        return upstream
    if upstream is None:
        raise RouteError(f"unknown waypoint: waypoint {_shown(reference)} not found")
    if service is not None and upstream.workload.network != journey.source.network:
        return _through_network_gateway(journey, upstream, service)

    def hop_at(ip: IpAddress) -> Hop:
        return Hop(
            protocol=HopProtocol.HBONE,
            peer=Endpoint(ip, upstream.port),
            authority=journey.target,
            expected=upstream.identities,
            workload=upstream.workload,
            service=service,
            ignored_names=upstream.ignored_names,
        )

    return _place(hop_at, upstream, family_hint(reference, journey.target.ip))


def _direct(journey: _Journey, upstream: Upstream, service: Service | None) -> Route:
    """Go to the workload itself, through its network's gateway if that is not ours."""
    workload = upstream.workload
    if workload.network != journey.source.network:
        if service is None:
            raise RouteError(f"no service for target address: {journey.target}")
        return _through_network_gateway(journey, upstream, service)
    is_tunnel = workload.protocol is TunnelProtocol.HBONE

    def hop_at(ip: IpAddress) -> Hop:
        return Hop(
            protocol=HopProtocol.HBONE if is_tunnel else HopProtocol.TCP,
            peer=Endpoint(ip, HBONE_PORT if is_tunnel else upstream.port),
            authority=Endpoint(ip, upstream.port) if is_tunnel else None,
            expected=upstream.identities,
            workload=workload,
            service=service,
            ignored_names=upstream.ignored_names,
        )

    return _place(hop_at, upstream, journey.target.ip)


def _through_network_gateway(journey: _Journey, upstream: Upstream, service: Service) -> Route:
    """Tunnel within a tunnel, through the gateway of the workload's network.

    The far side balances again, so only the service's identities can be expected inside.
    """
    reference = upstream.workload.network_gateway
    if reference is None:
        raise _no_destination(upstream.workload)
    gateway = _find_gateway(journey, reference, Purpose.STANDARD)
    if isinstance(gateway, UnknownAddress):
        return gateway
    if gateway is None:
        raise RouteError(f"unknown network gateway: network gateway {_shown(reference)} not found")

    def hop_at(ip: IpAddress) -> Hop:
        return Hop(
            protocol=HopProtocol.DOUBLE_HBONE,
            peer=Endpoint(ip, gateway.port),
            authority=HostPort(service.hostname, journey.target.port),
            expected=gateway.identities,
            inner_expected=upstream.service_identities,
            workload=upstream.workload,
            service=service,
            ignored_names=(*gateway.ignored_names, *upstream.ignored_names),
        )

    return _place(hop_at, gateway, family_hint(reference, journey.target.ip))


def _find_gateway(
    journey: _Journey, reference: GatewayAddress, purpose: Purpose
) -> Upstream | UnknownAddress | None:
    what = str(reference.destination)
    found = at_gateway(
        journey.store,
        reference,
        source=journey.source,
        purpose=purpose,
        rng=journey.rng,
        feedback=journey.feedback,
    )
    return UnknownAddress(what) if found is None and journey.lacks(what) else found


def _pass_through(target: Endpoint, service: Service | None) -> Hop:
    return Hop(protocol=HopProtocol.TCP, peer=target, service=service, passthrough=True)


def _place(hop_at: Callable[[IpAddress], Hop], upstream: Upstream, target: IpAddress) -> Route:
    """Give a hop its address, or say which name must be resolved for it."""
    ip = choose_ip(upstream, target)
    if ip is not None:
        return hop_at(ip)
    workload = upstream.workload
    if not workload.hostname:
        raise _no_destination(workload)
    return ResolveHostname(
        workload=workload, hostname=workload.hostname, target=target, hop_at=hop_at
    )


def _no_destination(workload: Workload) -> RouteError:
    return RouteError(f"no valid routing destination for workload: {workload.uid}")


def _shown(reference: GatewayAddress) -> str:
    """Return a gateway reference as the reference proxy prints it."""
    destination = reference.destination
    return destination.hostname if isinstance(destination, NamespacedHostname) else str(destination)
