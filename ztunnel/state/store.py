"""The store: one update is applied as a whole, then whoever listens is told what changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field

from ztunnel.model.identity import Namespace
from ztunnel.model.network import IpAddress, Network
from ztunnel.model.policy import Policy
from ztunnel.model.service import Service
from ztunnel.model.workload import (
    NamespacedHostname,
    PolicyKey,
    ServiceKey,
    Workload,
    WorkloadUid,
)
from ztunnel.state.policies import STAGED_MIN, Policies, StagedPolicies
from ztunnel.state.services import Services
from ztunnel.state.workloads import Workloads


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is new and what is gone; `replace_all` means whatever is not named is gone.

    Something both removed and put is put: a response may replace a pod by its successor.
    """

    workloads: Collection[Workload] = ()
    services: Collection[Service] = ()
    policies: Collection[Policy] = ()
    removed_workloads: Collection[WorkloadUid] = ()
    removed_services: Collection[ServiceKey] = ()
    removed_policies: Collection[PolicyKey] = ()
    replace_all: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update really changed; something sent again unchanged is not in it."""

    workloads: set[WorkloadUid] = field(default_factory=set)
    services: set[ServiceKey] = field(default_factory=set)
    policies: set[PolicyKey] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.workloads or self.services or self.policies)


Listener = Callable[[Changes], None]


class Store:
    """Everything the control plane told us. One writer calls `apply`; nothing in it awaits."""

    def __init__(self, *, node: str = "") -> None:
        self.version = 0
        self.workloads = Workloads(node)
        self.services = Services()
        self.policies = Policies()
        self._listeners: dict[int, Listener] = {}
        self._subscriptions = 0

    def apply(self, update: Update) -> Changes:
        """Apply one update and tell the listeners, who must not raise.

        Removals come first, so that a new pod may take over the address of an old one.
        """
        return self._apply(update, None)

    def applying(self, update: Update) -> Generator[None, None, Changes]:
        """Apply one update as a whole, but with rests before and after it if it is a large one.

        Meant are policies, which must not be seen in part. Addresses may be, so whoever has many
        gives them in several updates.
        """
        staged = None
        if len(update.policies) + len(update.removed_policies) > STAGED_MIN:
            assert not update.replace_all
            staged = yield from self.policies.stage(update.policies, update.removed_policies)
        changes = self._apply(update, staged)
        if staged is not None:
            yield
            yield from staged.take_apart()
        return changes

    def _apply(self, update: Update, staged: StagedPolicies | None) -> Changes:
        changes = Changes()
        self._remove(update, changes)
        if staged is not None and self.policies.commit(staged):
            changes.policies.update(staged.coming)
        else:
            self._change_policies(update, changes)
        for service in update.services:
            if self.services.by_key(service.key) != service:
                self.services.put(service)
                changes.services.add(service.key)
        by_uid, put, put_endpoint = (
            self.workloads.by_uid,
            self.workloads.put,
            self.services.put_endpoint,
        )
        for workload in update.workloads:
            if by_uid(workload.uid) != workload:
                put_endpoint(workload, put(workload))
                changes.workloads.add(workload.uid)
        if changes:
            self.version += 1
            for listener in tuple(self._listeners.values()):
                listener(changes)
        return changes

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after each update that changed something; return how to stop that."""
        self._subscriptions += 1
        ticket = self._subscriptions
        self._listeners[ticket] = listener

        def unsubscribe() -> None:
            self._listeners.pop(ticket, None)

        return unsubscribe

    def at_address(
        self, network: Network, ip: IpAddress, client_namespace: Namespace | None = None
    ) -> Workload | Service | None:
        """Say what an address is: a workload, else a service (state-and-xds.md 10.3)."""
        return self.workloads.by_address(network, ip) or self.services.by_vip(
            network, ip, client_namespace
        )

    def at_hostname(self, name: NamespacedHostname) -> Service | Workload | None:
        """Say what a gateway reference by name means: a service, else a workload."""
        return self.services.by_name(name) or self.workloads.by_hostname(
            name.namespace, name.hostname
        )

    def _remove(self, update: Update, changes: Changes) -> None:
        workloads: set[WorkloadUid] = set(update.removed_workloads)
        services: set[ServiceKey] = set(update.removed_services)
        if update.replace_all:
            workloads.update(workload.uid for workload in self.workloads.all())
            services.update(service.key for service in self.services.all())
        if not (workloads or services):
            return
        workloads.difference_update(workload.uid for workload in update.workloads)
        services.difference_update(service.key for service in update.services)
        for uid in workloads:
            if old := self.workloads.remove(uid):
                self.services.remove_endpoint(old)
                changes.workloads.add(uid)
        for service_key in services:
            if self.services.remove(service_key):
                changes.services.add(service_key)

    def _change_policies(self, update: Update, changes: Changes) -> None:
        gone: set[PolicyKey] = set(update.removed_policies)
        if update.replace_all:
            gone.update(policy.key for policy in self.policies.all())
        if gone:
            gone.difference_update(policy.key for policy in update.policies)
        for key in gone:
            if self.policies.remove(key):
                changes.policies.add(key)
        for policy in update.policies:
            if self.policies.by_key(policy.key) != policy:
                self.policies.put(policy)
                changes.policies.add(policy.key)
