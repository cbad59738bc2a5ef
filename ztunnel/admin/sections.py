"""The parts of the config dump that show what the store knows, and the static configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.admin.config_dump import Large, ListSection, Many, Section
from ztunnel.xds.local import (
    endpoint_to_dict,
    policy_to_dict,
    service_to_dict,
    static_workload_to_dict,
    workload_to_dict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ztunnel.model.policy import Policy
    from ztunnel.model.service import Service
    from ztunnel.model.workload import Workload
    from ztunnel.state.store import Store, Update


def state_sections(store: Store) -> dict[str, Section]:
    """Make the sections of workloads, services and policies."""
    return {
        "workloads": ListSection(items=store.workloads.all, key=_uid, show=workload_to_dict),
        "services": ListSection(items=store.services.all, key=_hostname, show=_service_in(store)),
        "policies": ListSection(items=store.policies.all, key=_policy_key, show=policy_to_dict),
    }


def static_config(static: Update, store: Store) -> Mapping[str, object]:
    """Show the static configuration as its file has it; endpoints are those that `store` knows."""
    return {
        "workloads": Many(items=static.workloads, key=_uid, show=static_workload_to_dict),
        "services": Many(items=static.services, key=_hostname, show=_service_in(store)),
        "policies": Many(items=static.policies, key=_policy_key, show=policy_to_dict),
    }


def _service_in(store: Store) -> Callable[[Service], Mapping[str, object]]:
    def show(service: Service) -> Mapping[str, object]:
        endpoints = Many(
            items=list(store.services.endpoints(service)),
            key=_uid,
            show=lambda workload: endpoint_to_dict(workload, service.key),
            is_object=True,
        )
        return Large(service_to_dict(service), endpoints=endpoints)

    return show


def _uid(workload: Workload) -> str:
    return workload.uid


def _hostname(service: Service) -> str:
    return service.hostname


def _policy_key(policy: Policy) -> str:
    return policy.key
