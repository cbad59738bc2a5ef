"""Which addresses a DNS name has for one workload (dns-and-observability.md 2.4 to 2.7).

Beyond the reference: pods of headless services by name, what an address is called, and headless
services leave out endpoints in other networks, whose addresses mean nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from ztunnel.decide.pod_names import PodNames, label_of
from ztunnel.model.identity import Namespace
from ztunnel.model.network import IpAddress, Network
from ztunnel.model.service import IpFamilies, Service, Visibility
from ztunnel.model.workload import Workload
from ztunnel.state.services import Services, accepts_unhealthy
from ztunnel.state.workloads import Workloads

_REVERSE_V4, _REVERSE_V6 = ".in-addr.arpa", ".ip6.arpa"
_OCTETS, _NIBBLES = 4, 32
_V4 = 4
_FORBIDDEN = {4: IpFamilies.IPV6_ONLY, 6: IpFamilies.IPV4_ONLY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewpoint:
    """Who asks, and what decides how names look from there."""

    namespace: Namespace
    network: Network
    cluster_domain: str = "cluster.local"
    preferred_namespace: Namespace | None = None
    ipv6: bool = True
    search: tuple[str, ...] | None = None  # None: we cannot know

    @property
    def search_domains(self) -> tuple[str, ...]:
        """The pod's search list; if we cannot know it, that of the usual `dnsPolicy`."""
        if self.search is not None:
            return self.search
        domain = self.cluster_domain
        return f"{self.namespace}.svc.{domain}", f"svc.{domain}", domain


@dataclass(frozen=True, slots=True)
class Found:
    """A name of the mesh. `owner` is whom the records belong to: the name, or what it stands for.

    `endpoint` is the pod, if the name is a pod's.
    """

    service: Service
    owner: str
    endpoint: Workload | None = None
    by_wildcard: bool = False


def expansions(name: str, view: Viewpoint) -> list[str]:
    """Say what a name means inside Kubernetes."""
    namespace, domain = view.namespace, view.cluster_domain
    match name.split("."):
        case [service]:
            return [f"{service}.{namespace}.svc.{domain}"]
        case [_, _]:
            return [f"{name}.svc.{domain}", f"{name}.{namespace}.svc.{domain}"]
        case [_, _, "svc"]:
            return [f"{name}.{domain}", f"{name}.svc.{domain}"]
        case [_, _, _]:
            return [f"{name}.svc.{domain}"]
        case [_, _, _, "svc"]:
            return [f"{name}.{domain}"]
        case _:
            return []


def aliases(name: str, view: Viewpoint) -> dict[str, str | None]:
    """List what a name may stand for, in order; with what was left of it, if that was stripped."""
    found: dict[str, str | None] = dict.fromkeys([name, *expansions(name, view)])
    for domain in view.search_domains:
        rest = name.removesuffix(f".{domain}")
        if rest and rest != name:
            for alias in (rest, *expansions(rest, view)):
                found.setdefault(alias, rest)
    return found


def candidates(alias: str) -> Iterator[str]:
    """Yield a name, then the wildcards that cover it, from narrow to wide."""
    yield alias
    _, dot, rest = alias.partition(".")
    while dot:
        yield f"*.{rest}"
        _, dot, rest = rest.partition(".")


def find(name: str, view: Viewpoint, services: Services) -> Found | None:
    """Find what a lower-case name without its last dot means; None if it is not the mesh's."""
    for alias, stripped in aliases(name, view).items():
        for candidate in candidates(alias):
            service = _choose(candidate, view, services)
            if service is not None:
                by_wildcard = candidate.startswith("*.")
                owner = name if stripped is None or by_wildcard else stripped
                return Found(service, owner, None, by_wildcard)
    return _find_pod(name, view, services)


def addresses(found: Found, version: int, view: Viewpoint, services: Services) -> list[IpAddress]:
    """List the addresses of one IP version, in no particular order."""
    service = found.service
    if (version != _V4 and not view.ipv6) or service.ip_families is _FORBIDDEN[version]:
        return []
    if found.endpoint is not None:
        return first_ip(found.endpoint, version)
    if service.vips:
        return [
            vip.ip
            for vip in service.vips
            if vip.network == view.network and vip.ip.version == version
        ]
    network, family = view.network, IPv4Address if version == _V4 else IPv6Address
    listed: list[IpAddress] = []
    for workload in services.endpoints(service):  # thousands: no call for each
        if workload.network == network:
            for ip in workload.ips:
                if isinstance(ip, family):
                    listed.append(ip)
                    break
    return listed


def allows(found: Found, version: int, view: Viewpoint) -> bool:
    """Tell whether there could be addresses of this IP version at all."""
    is_off = version != _V4 and not view.ipv6
    return not is_off and found.service.ip_families is not _FORBIDDEN[version]


def name_of(ip: IpAddress, view: Viewpoint, services: Services, workloads: Workloads) -> str | None:
    """Say what an address of the client's network is called; None if the mesh has no name."""
    sharing = [
        service
        for service in services.sharing_vip(view.network, ip)
        if _is_visible(service, view) and not service.hostname.startswith("*")
    ]
    if sharing:
        return _best(sharing, view).hostname
    workload = workloads.by_address(view.network, ip)
    if workload is None:
        return None
    for key in workload.services:
        service = services.by_key(key)
        if service is None or service.vips or not _is_answered(service, view):
            continue
        label = label_of(workload)
        if _is_visible(service, view) and _pods(service, view, services).get(label) is workload:
            return f"{label}.{service.hostname}"
    return workload.hostname or None


def reversed_address(name: str) -> IpAddress | None:
    """Read `4.3.2.1.in-addr.arpa` or its IPv6 form (RFC 1035 s3.5, RFC 3596 s2.5)."""
    try:
        if name.endswith(_REVERSE_V4):
            octets = name.removesuffix(_REVERSE_V4).split(".")
            return IPv4Address(".".join(reversed(octets))) if len(octets) == _OCTETS else None
        nibbles = name.removesuffix(_REVERSE_V6)
        digits = nibbles.split(".")
        if nibbles == name or len(digits) != _NIBBLES or any(len(digit) != 1 for digit in digits):
            return None
        return IPv6Address(int("".join(reversed(digits)), 16))
    except ValueError:
        return None


def first_ip(workload: Workload, version: int) -> list[IpAddress]:
    """Give the address of one IP version that a pod is known by; none or one."""
    return [ip for ip in workload.ips if ip.version == version][:1]


def _find_pod(name: str, view: Viewpoint, services: Services) -> Found | None:
    """Find `pod.service.namespace.svc.domain` of a headless service."""
    inside = name.removesuffix(f".svc.{view.cluster_domain}")
    pod, dot, rest = inside.partition(".")
    if inside == name or not dot or rest.count(".") != 1:
        return None
    service = _choose(f"{rest}.svc.{view.cluster_domain}", view, services)
    if service is None or service.vips:
        return None
    endpoint = _pods(service, view, services).get(pod)
    return None if endpoint is None else Found(service, name, endpoint)


def _pods(service: Service, view: Viewpoint, services: Services) -> PodNames:
    endpoints = services.endpoints_of(service.key)
    question = "pod names", view.network
    pods = endpoints.followed(question)
    if pods is None:
        takes_all = accepts_unhealthy(service)
        pods = PodNames(view.network, endpoints.members.values(), takes_all=takes_all)
        endpoints.follow(question, pods)
    assert isinstance(pods, PodNames)
    return pods


def _choose(hostname: str, view: Viewpoint, services: Services) -> Service | None:
    """Choose among all services of this host name that may be answered (2.5)."""
    choice = services.by_hostname(hostname, view.namespace, view.preferred_namespace)
    if choice is None or _is_answered(choice, view):
        return choice
    # The usual first choice is not one of them: rank those that are.
    others = [
        service
        for service in services.named(hostname)
        if _is_visible(service, view) and _is_answered(service, view)
    ]
    return _best(others, view) if others else None


def _best(services: Iterable[Service], view: Viewpoint) -> Service:
    """Rank: the client's namespace, canonical (the last one), preferred namespace, first."""

    def rank(numbered: tuple[int, Service]) -> tuple[bool, bool, bool, int]:
        number, service = numbered
        is_canonical = service.canonical
        return (
            service.namespace == view.namespace,
            is_canonical,
            not is_canonical and service.namespace == view.preferred_namespace,
            number if is_canonical else -number,
        )

    return max(enumerate(services), key=rank)[1]


def _is_answered(service: Service, view: Viewpoint) -> bool:
    """Tell whether we know its addresses; a ServiceEntry without exact ones is for upstream."""
    return bool(service.vips) or service.hostname.endswith(f".svc.{view.cluster_domain}")


def _is_visible(service: Service, view: Viewpoint) -> bool:
    return service.visibility is Visibility.PUBLIC or service.namespace == view.namespace
