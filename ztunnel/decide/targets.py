"""Where a service can be called: what SRV records say (RFC 2782), as cluster DNS says it.

Beyond the reference, which answers none. A headless service is where its pods are, by their names
and their own ports; any other is where its address is, by its own name and ports. The control plane
tells ports by number only: `_8080._tcp.web` can be answered, and what `_http._tcp.web` means is
known to the cluster's resolver alone. It tells no protocol either, and no mesh carries UDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ztunnel.decide import names
from ztunnel.decide.names import Found, Viewpoint
from ztunnel.decide.pod_names import label_of
from ztunnel.model.network import PORT_MAX, IpAddress, Port
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload
from ztunnel.state.services import Services

# As many SRV records of the shortest names as no DNS message can hold; nobody can be told of more.
TARGETS_MAX = 2200
_VERSIONS = (4, 6)


@dataclass(frozen=True, slots=True)
class Target:
    """A host and its port; `addresses` are those that the host's name has for whoever asks."""

    host: str
    port: Port
    addresses: tuple[IpAddress, ...]


def numbered(name: str) -> tuple[Port, str] | None:
    """Read `_8080._tcp.rest`, and return the port of the service and the rest of the name."""
    match name.split(".", 2):
        case [port, "_tcp", rest] if port[:1] == "_" and port[1:].isdecimal() and port.isascii():
            number = port[1:]
            # As people write it: one port has one name.
            if number[0] != "0" and len(number) <= len(str(PORT_MAX)) and int(number) <= PORT_MAX:
                return Port(int(number)), rest
    return None


def targets(
    found: Found, view: Viewpoint, services: Services, port: Port | None = None
) -> list[Target] | None:
    """List where a service is, at one of its ports or at each; None if we cannot know.

    We cannot for names outside Kubernetes: what SRV records mean there is their owners' choice.
    The list ends with the pod that makes it `TARGETS_MAX` long.
    """
    service = found.service
    if found.by_wildcard or not service.hostname.endswith(f".svc.{view.cluster_domain}"):
        return None
    versions = [version for version in _VERSIONS if names.allows(found, version, view)]
    if service.vips:
        addresses = tuple(
            ip for version in versions for ip in names.addresses(found, version, view, services)
        )
        return [
            Target(service.hostname, number, addresses)
            for number, _ in _chosen(service.ports, port)
        ]
    pods = [found.endpoint] if found.endpoint is not None else services.endpoints(service)
    listed: dict[tuple[str, Port], Target] = {}
    for pod in pods:
        if len(listed) >= TARGETS_MAX:
            break
        label = label_of(pod)
        if label and pod.network == view.network:
            host = f"{label}.{service.hostname}"
            addresses = tuple(ip for version in versions for ip in names.first_ip(pod, version))
            for number in _ports(pod, service, port):
                listed.setdefault((host, number), Target(host, number, addresses))
    return list(listed.values())


def _ports(pod: Workload, service: Service, port: Port | None) -> Iterator[Port]:
    """Yield the pod's own ports that are meant by one port of the service, or by all."""
    for wanted, target in _chosen(pod.services.get(service.key, {}), port):
        yield target or service.ports.get(wanted) or wanted


def _chosen(ports: Mapping[Port, Port], port: Port | None) -> Iterator[tuple[Port, Port]]:
    return (pair for pair in ports.items() if port is None or pair[0] == port)
