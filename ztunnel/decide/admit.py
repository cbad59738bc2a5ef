"""Is this inbound connection for a workload of ours, and where exactly (dataplane.md 3.3 to 3.8).

The checks come in the reference's order, so that the same wrong request gets the same status.
Policy judges afterwards, on `Admission.destination`.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from ztunnel.decide.classify import SELF_CALL, is_inbound_self_call
from ztunnel.decide.route import UnknownAddress
from ztunnel.decide.upstream import refers_to
from ztunnel.decide.waypoint import waypoints_of
from ztunnel.model.network import Endpoint, HostPort, IpAddress, Network, Port, canonical
from ztunnel.model.service import Service
from ztunnel.model.workload import AppProtocol, Workload
from ztunnel.state.store import Store

_LOOPBACK_V4 = IPv4Address("127.0.0.1")
_LOOPBACK_V6 = IPv6Address("::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Where an inbound connection goes.

    `destination` is what policy judges; `dial` is what to connect to, the same but for an
    application tunnel on loopback. With `proxy_destination` the application wants a PROXY
    header first, with this as its destination. `service` is a guess, for telemetry only.
    """

    destination: Endpoint
    dial: Endpoint
    proxy_destination: Endpoint | None = None
    service: Service | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """The status to refuse a CONNECT with, and why."""

    status: int
    message: str


Answer: TypeAlias = Admission | Rejection | UnknownAddress


def admit(
    connection_local: Endpoint,
    authority: Endpoint | HostPort,
    *,
    workload: Workload,
    store: Store,
    illegal: Container[int],
    network: Network,
    forwarded_host: str | None = None,
    tunnels_to_loopback: bool = True,
    on_demand: bool = False,
    fetched: Collection[str] = (),
) -> Answer:
    """Decide about one CONNECT received at `connection_local` of `workload`.

    `network` is our own; `forwarded_host` is what the `forwarded` header says about the host.
    With `on_demand` an unknown authority is answered by `UnknownAddress`, unless it is in
    `fetched`.
    """
    if isinstance(authority, Endpoint):
        # A peer may write a v4 address in its v6-mapped form; it means the same.
        authority = Endpoint(canonical(authority.ip), authority.port)
        if not _is_ours(connection_local.ip, authority.ip, workload, store, network):
            return _mismatch(connection_local.ip, authority.ip, store, network, on_demand, fetched)
    service: Service | None = None
    port = authority.port
    if isinstance(authority, HostPort):
        service = _service_named(authority.host, workload, store)
        if service is None:
            return _unavailable(f"no service or workload for hostname: {authority.host}")
        mapped = workload.services.get(service.key, {}).get(port) or service.ports.get(port)
        if not mapped:
            return _unavailable(f"requested service {authority} found, but cannot resolve port")
        port = mapped
    destination = Endpoint(connection_local.ip, port)
    if is_inbound_self_call(destination, illegal):
        return _unavailable(SELF_CALL)
    return _enter(
        destination,
        authority,
        workload=workload,
        store=store,
        service=service,
        network=network,
        forwarded_host=forwarded_host,
        tunnels_to_loopback=tunnels_to_loopback,
    )


def admit_plaintext(
    original: Endpoint,
    *,
    source: Endpoint,
    workload: Workload,
    store: Store,
    illegal: Container[int],
) -> Admission | Rejection:
    """Decide about a plaintext connection from `source` that meant to go to `original`.

    A neighbour on the same link can address frames to a pod's loopback. The kernel would drop them,
    but the pod's rules rewrite the destination before it looks; so we must.
    """
    if is_inbound_self_call(original, illegal):
        return _unavailable(SELF_CALL)
    if original.ip.is_loopback and not source.ip.is_loopback:
        return _unavailable(f"{original} is not for callers from outside")
    service = guess_service(_services_of(workload, store), workload, original.port, None)
    return Admission(destination=original, dial=original, service=service)


def guess_service(
    candidates: Iterable[Service], workload: Workload, port: Port, forwarded_host: str | None
) -> Service | None:
    """Guess which service the caller meant: by the forwarded host, else by the final port."""
    by_port: Service | None = None
    for service in candidates:
        if forwarded_host and service.hostname == forwarded_host:
            return service
        mapping = workload.services.get(service.key, {})
        if by_port is None and (port in mapping.values() or port in service.ports.values()):
            by_port = service
    return by_port


def _enter(
    destination: Endpoint,
    authority: Endpoint | HostPort,
    *,
    workload: Workload,
    store: Store,
    service: Service | None,
    network: Network,
    forwarded_host: str | None,
    tunnels_to_loopback: bool,
) -> Admission | Rejection:
    """Apply the workload's application tunnel, if it has one (3.6)."""
    dial = destination
    proxy_destination: Endpoint | None = None
    if tunnel := workload.application_tunnel:
        # After the self-call test and before policy: policy judges the final port.
        destination = dial = Endpoint(destination.ip, tunnel.port or destination.port)
        if tunnel.protocol is AppProtocol.PROXY:
            proxy_destination = _proxy_destination(authority, service, network)
            if proxy_destination is None:
                return _unavailable(
                    f"requested service {_host(authority)} found, but has no IP addresses"
                )
            if tunnels_to_loopback:
                dial = Endpoint(_loopback(destination.ip), destination.port)
    candidates = [service] if service else _services_of(workload, store)
    return Admission(
        destination=destination,
        dial=dial,
        proxy_destination=proxy_destination,
        service=guess_service(candidates, workload, destination.port, forwarded_host),
    )


def _is_ours(
    local: IpAddress, asked: IpAddress, workload: Workload, store: Store, network: Network
) -> bool:
    """Tell whether we may take a connection for the address `asked` (3.4).

    It is our own, or an application tunnel takes any, or it belongs to somebody whose waypoint
    we are.
    """
    if asked == local or workload.application_tunnel is not None:
        return True
    # All services of the address: a waypoint also serves namespaces it cannot see into.
    owners = (
        store.workloads.by_address(network, asked),
        store.services.by_vip(network, asked),
        *store.services.sharing_vip(network, asked),
    )
    return any(
        refers_to(store, waypoint, workload)
        for owner in owners
        if owner is not None
        for waypoint in waypoints_of(owner)
    )


def _mismatch(
    local: IpAddress,
    asked: IpAddress,
    store: Store,
    network: Network,
    on_demand: bool,  # noqa: FBT001
    fetched: Collection[str],
) -> Rejection | UnknownAddress:
    what = f"{network}/{asked}"
    if on_demand and what not in fetched and store.at_address(network, asked) is None:
        return UnknownAddress(what)
    return Rejection(status=HTTPStatus.BAD_REQUEST, message=f"ip mismatch: {local} != {asked}")


def _service_named(host: str, workload: Workload, store: Store) -> Service | None:
    return store.services.by_hostname(host, workload.namespace)


def _services_of(workload: Workload, store: Store) -> Iterable[Service]:
    found = (store.services.by_key(key) for key in workload.services)
    return (service for service in found if service is not None)


def _proxy_destination(
    authority: Endpoint | HostPort, service: Service | None, network: Network
) -> Endpoint | None:
    """Return the address the PROXY header names: a VIP if only a host name was asked for."""
    if isinstance(authority, Endpoint):
        return authority
    assert service is not None
    ranked = sorted(service.vips, key=lambda vip: (vip.network != network, vip.ip.version))
    return Endpoint(ranked[0].ip, authority.port) if ranked else None


def _host(authority: Endpoint | HostPort) -> str:
    return authority.host if isinstance(authority, HostPort) else str(authority.ip)


def _loopback(ip: IpAddress) -> IpAddress:
    return _LOOPBACK_V4 if isinstance(ip, IPv4Address) else _LOOPBACK_V6


def _unavailable(message: str) -> Rejection:
    return Rejection(status=HTTPStatus.SERVICE_UNAVAILABLE, message=message)
