"""From an address or a gateway reference to the workload that will take the connection.

dataplane.md 2.4 to 2.7, state-and-xds.md 10.3 to 10.8.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address

from ztunnel.decide.balance import Purpose, pick
from ztunnel.decide.feedback import Feedback
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint, IpAddress, Network, NetworkAddress, Port
from ztunnel.model.service import BalanceMode, IpFamilies, Service
from ztunnel.model.workload import (
    GatewayAddress,
    Workload,
)
from ztunnel.state.store import Store


@dataclass(frozen=True, slots=True)
class Upstream:
    """The chosen workload, the port on it, and the service it was reached through."""

    workload: Workload
    port: Port
    service: Service | None = None

    @property
    def service_identities(self) -> tuple[Identity, ...]:
        """The identities the service vouches for."""
        return parse_names(self.service.subject_alt_names)[0] if self.service else ()

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Whom to accept at the other end: the service's identities and the workload's own."""
        return (*self.service_identities, self.workload.identity)

    @property
    def ignored_names(self) -> tuple[str, ...]:
        """The service's alternative names that are not Istio identities."""
        return parse_names(self.service.subject_alt_names)[1] if self.service else ()


@lru_cache(maxsize=4096)
def parse_names(names: tuple[str, ...]) -> tuple[tuple[Identity, ...], tuple[str, ...]]:
    """Return the identities among `names`, and the names that are none."""
    identities: list[Identity] = []
    others: list[str] = []
    for name in names:
        try:
            identities.append(Identity.parse(name))
        except ValueError:
            others.append(name)
    return tuple(identities), tuple(others)


def of_service(
    store: Store,
    service: Service,
    port: Port,
    *,
    source: Workload,
    purpose: Purpose,
    rng: random.Random,
    feedback: Feedback | None = None,
) -> Upstream | None:
    """Pick an endpoint of the service; None for PASSTHROUGH and when there is none."""
    if is_passthrough(service):
        return None
    found = pick(
        store.services, service, port, source=source, purpose=purpose, rng=rng, feedback=feedback
    )
    return Upstream(found.workload, found.port, service) if found else None


def at_address(
    store: Store,
    network: Network,
    target: Endpoint,
    *,
    source: Workload,
    purpose: Purpose,
    rng: random.Random,
    feedback: Feedback | None = None,
) -> Upstream | None:
    """Return who takes a connection to an address: a service's endpoint, else a workload.

    An address that is a workload's as well as a service's belongs to the service for the ports
    the service declares, and to the workload for the others.
    """
    service = store.services.by_vip(network, target.ip, source.namespace)
    workload = store.workloads.by_address(network, target.ip)
    if service is not None and (workload is None or target.port in service.ports):
        return of_service(
            store, service, target.port, source=source, purpose=purpose, rng=rng, feedback=feedback
        )
    return Upstream(workload, target.port) if workload else None


def at_gateway(
    store: Store,
    gateway: GatewayAddress,
    *,
    source: Workload,
    purpose: Purpose,
    rng: random.Random,
    feedback: Feedback | None = None,
) -> Upstream | None:
    """Return which workload stands for a waypoint or network gateway; None when unknown."""
    port = gateway.hbone_mtls_port
    if isinstance(gateway.destination, NetworkAddress):
        address = gateway.destination
        target = Endpoint(address.ip, port)
        return at_address(
            store,
            address.network,
            target,
            source=source,
            purpose=purpose,
            rng=rng,
            feedback=feedback,
        )
    found = store.at_hostname(gateway.destination)
    if isinstance(found, Service):
        return of_service(
            store, found, port, source=source, purpose=purpose, rng=rng, feedback=feedback
        )
    return Upstream(found, port) if found else None


def family_hint(gateway: GatewayAddress, target: IpAddress) -> IpAddress:
    """Return the address whose family the gateway should have.

    A gateway given by address is reached in that address's family, so an IPv6 client may be
    sent to an IPv4 waypoint; one given by name follows the client.
    """
    if isinstance(gateway.destination, NetworkAddress):
        return gateway.destination.ip
    return target


def choose_ip(upstream: Upstream, target: IpAddress) -> IpAddress | None:
    """Choose among the workload's addresses (2.6); None when none may be used.

    The target itself, else one of the target's family, else the first the service allows.
    """
    ips = upstream.workload.ips
    if target in ips:
        return target
    allowed = [ip for ip in ips if _is_allowed(ip, upstream.service)]
    same_family = (ip for ip in allowed if ip.version == target.version)
    return next(same_family, allowed[0] if allowed else None)


def _is_allowed(ip: IpAddress, service: Service | None) -> bool:
    match service.ip_families if service else None:
        case IpFamilies.IPV4_ONLY:
            return isinstance(ip, IPv4Address)
        case IpFamilies.IPV6_ONLY:
            return not isinstance(ip, IPv4Address)
        case _:
            return True


def is_passthrough(service: Service) -> bool:
    """Tell whether the service wants its connections sent where they were going."""
    balancer = service.load_balancer
    return balancer is not None and balancer.mode is BalanceMode.PASSTHROUGH


def refers_to(store: Store, gateway: GatewayAddress, workload: Workload) -> bool:
    """Tell whether a gateway reference means this workload, alone or behind a service."""
    reference = gateway.destination
    if isinstance(reference, NetworkAddress):
        if reference.network == workload.network and reference.ip in workload.ips:
            return True
        service = store.services.by_vip(reference.network, reference.ip)
    else:
        name = (workload.namespace, workload.hostname)
        if workload.hostname and (reference.namespace, reference.hostname) == name:
            return True
        service = store.services.by_name(reference)
    return service is not None and workload.uid in store.services.endpoints_of(service.key).members
