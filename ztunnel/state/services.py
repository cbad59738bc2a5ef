"""Services by key, by host name, by VIP and by CIDR VIP, and their endpoints (9.2 to 10.2).

Endpoints are one relation: workload -> keys of its services. It is kept whether or not the
service is known, and for unhealthy workloads too, so that no order of arrival, no re-add and no
change of health policy loses an endpoint. What counts is filtered when somebody asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from ztunnel.model.identity import Namespace
from ztunnel.model.network import IpAddress, Network, NetworkCidr
from ztunnel.model.service import HealthPolicy, Service
from ztunnel.model.workload import Health, NamespacedHostname, ServiceKey, Workload, WorkloadUid
from ztunnel.state.addresses import address_bits, address_key, masked, prefix_shape
from ztunnel.state.candidates import Candidates
from ztunnel.state.endpoints import Endpoints

K = TypeVar("K")


class Services:
    """What the control plane told us about services."""

    def __init__(self) -> None:
        self._by_key: dict[ServiceKey, Service] = {}
        self._by_hostname: dict[str, Candidates] = {}
        self._by_vip: dict[Network, dict[int, Candidates]] = {}
        self._by_cidr: dict[Network, dict[tuple[int, int], dict[int, Candidates]]] = {}
        self._endpoints: dict[ServiceKey, Endpoints] = {}
        self._no_endpoints = Endpoints()  # never put into

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> Collection[Service]:
        """Return a live view of all services, oldest first."""
        return self._by_key.values()

    def by_key(self, key: ServiceKey) -> Service | None:
        """Return the service with this key, whoever asks."""
        return self._by_key.get(key)

    def by_name(self, name: NamespacedHostname) -> Service | None:
        """Return the service a gateway reference names."""
        return self._by_key.get(ServiceKey(f"{name.namespace}/{name.hostname}"))

    def by_hostname(
        self,
        hostname: str,
        client_namespace: Namespace | None = None,
        preferred_namespace: Namespace | None = None,
    ) -> Service | None:
        """Return the service a client of `client_namespace` means by this host name."""
        found = self._by_hostname.get(hostname)
        return found.choose(client_namespace, preferred_namespace) if found else None

    def named(self, hostname: str) -> Collection[Service]:
        """Return all services with this host name, visible or not, oldest first."""
        found = self._by_hostname.get(hostname)
        return found.all() if found else ()

    def by_vip(
        self, network: Network, ip: IpAddress, client_namespace: Namespace | None = None
    ) -> Service | None:
        """Return the service a client of `client_namespace` means by this address.

        An exact VIP beats every range; see `_by_range` for ranges.
        """
        vips = self._by_vip.get(network)
        if vips is not None:
            found = vips.get(address_key(ip))
            if found is not None and (service := found.choose(client_namespace)):
                return service
        shapes = self._by_cidr.get(network)
        return self._by_range(shapes, ip, client_namespace) if shapes else None

    def sharing_vip(self, network: Network, ip: IpAddress) -> Collection[Service]:
        """Return all services with exactly this VIP, visible or not, oldest first."""
        found = self._by_vip.get(network, {}).get(address_key(ip))
        return found.all() if found else ()

    def _by_range(
        self,
        shapes: dict[tuple[int, int], dict[int, Candidates]],
        ip: IpAddress,
        client_namespace: Namespace | None,
    ) -> Service | None:
        """Rank by (client's namespace, prefix length, canonical): one read per prefix length."""
        bits = address_bits(ip)
        stranger: Service | None = None
        for length in sorted((length for b, length in shapes if b == bits), reverse=True):
            found = shapes[bits, length].get(masked(ip, length))
            if found is None:
                continue
            if client_namespace is not None and (own := found.inside(client_namespace)):
                return own
            stranger = stranger or found.choose(client_namespace)
        return stranger

    def endpoints_of(self, key: ServiceKey) -> Endpoints:
        """Return every endpoint of the service, healthy or not, known service or not."""
        return self._endpoints.get(key, self._no_endpoints)

    def endpoints(self, service: Service) -> Iterator[Workload]:
        """Yield the endpoints that the service's health policy lets count."""
        takes_all = accepts_unhealthy(service)
        for workload in self.endpoints_of(service.key).members.values():
            if takes_all or workload.health is Health.HEALTHY:
                yield workload

    def staged(self) -> dict[ServiceKey, Collection[Workload]]:
        """Return the endpoints of services that are not known (yet)."""
        return {
            key: endpoints.members.values()
            for key, endpoints in self._endpoints.items()
            if key not in self._by_key
        }

    def put(self, service: Service) -> Service | None:
        """Store one service and return what it replaced.

        Where a VIP or range stays, the service keeps its place among those that share it.
        """
        old = self._by_key.get(service.key)
        self._by_key[service.key] = service
        if old is not None:
            self._unlink(old, keep=service)
        self._by_hostname.setdefault(service.hostname, Candidates()).put(service)
        for vip in service.vips:
            vips = self._by_vip.setdefault(vip.network, {})
            vips.setdefault(address_key(vip.ip), Candidates()).put(service)
        for cidr in service.cidr_vips:
            ranges = self._ranges(cidr)
            ranges.setdefault(_range_key(cidr), Candidates()).put(service)
        self.endpoints_of(service.key).forget()
        return old

    def remove(self, key: ServiceKey) -> Service | None:
        """Forget one service and return it; its endpoints stay, for when it comes back."""
        old = self._by_key.pop(key, None)
        if old is not None:
            self._unlink(old, keep=None)
            self.endpoints_of(key).forget()
        return old

    def put_endpoint(self, workload: Workload, replaced: Workload | None) -> None:
        """Make the endpoints of `replaced` those of `workload`, as a workload update does."""
        if replaced is not None:
            for key in replaced.services.keys() - workload.services.keys():
                self._drop_endpoint(key, replaced.uid)
        for key in workload.services:
            endpoints = self._endpoints.get(key)
            if endpoints is None:
                endpoints = self._endpoints[key] = Endpoints()
            endpoints.put(workload)

    def remove_endpoint(self, workload: Workload) -> None:
        """Take a removed workload out of all its services."""
        for key in workload.services:
            self._drop_endpoint(key, workload.uid)

    def _drop_endpoint(self, key: ServiceKey, uid: WorkloadUid) -> None:
        endpoints = self._endpoints[key]
        endpoints.remove(uid)
        if not endpoints.members:
            del self._endpoints[key]

    def _ranges(self, cidr: NetworkCidr) -> dict[int, Candidates]:
        shapes = self._by_cidr.setdefault(cidr.network, {})
        return shapes.setdefault(prefix_shape(cidr.cidr), {})

    def _unlink(self, old: Service, *, keep: Service | None) -> None:
        """Take `old` out of every index in which `keep` does not stand."""
        if keep is None:
            _withdraw(self._by_hostname, old.hostname, old)
        kept_vips = set(keep.vips) if keep else set()
        for vip in dict.fromkeys(old.vips):
            if vip not in kept_vips:
                _withdraw(self._by_vip[vip.network], address_key(vip.ip), old)
                if not self._by_vip[vip.network]:
                    del self._by_vip[vip.network]
        kept_cidrs = set(keep.cidr_vips) if keep else set()
        for cidr in dict.fromkeys(old.cidr_vips):
            if cidr not in kept_cidrs:
                self._unlink_range(cidr, old)

    def _unlink_range(self, cidr: NetworkCidr, old: Service) -> None:
        shapes = self._by_cidr[cidr.network]
        shape = prefix_shape(cidr.cidr)
        _withdraw(shapes[shape], _range_key(cidr), old)
        if not shapes[shape]:
            del shapes[shape]
        if not shapes:
            del self._by_cidr[cidr.network]


def accepts_unhealthy(service: Service) -> bool:
    """Tell whether unhealthy endpoints of this service count."""
    balancer = service.load_balancer
    return balancer is not None and balancer.health_policy is HealthPolicy.ALLOW_ALL


def _range_key(cidr: NetworkCidr) -> int:
    return masked(cidr.cidr.network_address, cidr.cidr.prefixlen)


def _withdraw(index: dict[K, Candidates], key: K, service: Service) -> None:
    index[key].remove(service)
    if not index[key]:
        del index[key]
