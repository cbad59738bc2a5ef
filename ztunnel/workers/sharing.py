"""What equal workloads share, shared again: a pickle of some knows nothing of the others."""

from __future__ import annotations

from functools import lru_cache
from sys import intern

from msgspec.structs import force_setattr

from ztunnel.model.network import Port
from ztunnel.model.workload import ServiceKey, Workload

# As `wire.resources` does where they are decoded.
TEXTS = (
    "namespace", "trust_domain", "service_account", "network", "workload_name", "workload_type",
    "canonical_name", "canonical_revision", "node", "cluster_id",
)  # fmt: skip
Ports = tuple[tuple[Port, Port], ...]


def share(workload: Workload) -> None:
    """Replace parts of a workload that has just been read by equal ones that others have."""
    for name in TEXTS:
        force_setattr(workload, name, intern(getattr(workload, name)))
    services = tuple((key, tuple(ports.items())) for key, ports in workload.services.items())
    force_setattr(workload, "services", _services(services))


@lru_cache(maxsize=16384)
def _services(entries: tuple[tuple[ServiceKey, Ports], ...]) -> dict[ServiceKey, dict[Port, Port]]:
    return {ServiceKey(intern(key)): _ports(ports) for key, ports in entries}


@lru_cache(maxsize=4096)
def _ports(ports: Ports) -> dict[Port, Port]:
    return dict(ports)
