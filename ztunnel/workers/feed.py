"""What one worker has not been told of the mesh's state yet. No I/O.

How it works: not updates are remembered but names: of what changed since the worker was told. An
update is made of what the store knows by then. So a new worker is one that was told nothing, a slow
one costs no memory, and both get to what holds now, in the order in which it came about.

A change of the usual size goes out as a whole. Of a larger one, workloads and services that are
gone come first, so that others may have their addresses; then policies, and only then those that
are gone, so that no workload is open in between; then services and workloads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from ztunnel.model.workload import PolicyKey, ServiceKey, WorkloadUid
from ztunnel.state.store import Changes, Store, Update

K = TypeVar("K")

SLICE_ITEMS = 8  # told at once: about a fifth of a millisecond of the worker's time
# Of policies more, which takes longer: some without the others may allow too much.
POLICIES_TOGETHER = 50


class Feed:
    """Follows a store for one worker; `take` gives the next part."""

    def __init__(self, store: Store) -> None:
        """Begin with all there is."""
        self._store = store
        self._gone_workloads: dict[WorkloadUid, None] = {}
        self._gone_services: dict[ServiceKey, None] = {}
        self._gone_policies: dict[PolicyKey, None] = {}
        self._policies: dict[PolicyKey, None] = {one.key: None for one in store.policies.all()}
        self._services: dict[ServiceKey, None] = {one.key: None for one in store.services.all()}
        self._workloads: dict[WorkloadUid, None] = {}
        # What was there at the beginning comes before them, looked at part by part: all at once
        # takes long.
        self._backlog = store.workloads.uids()
        self._early: dict[WorkloadUid, None] = {}

    def __bool__(self) -> bool:
        return bool(
            self._gone_workloads
            or self._gone_services
            or self._gone_policies
            or self._policies
            or self._services
            or self._workloads
            or self._backlog
            or self._early
        )

    def changed(self, changes: Changes) -> None:
        """Note what an update has changed in the store."""
        store = self._store
        for policy in changes.policies:
            _note(policy, self._policies, self._gone_policies, store.policies.by_key(policy))
        for service in changes.services:
            _note(service, self._services, self._gone_services, store.services.by_key(service))
        for uid in changes.workloads:
            self._early.pop(uid, None)
            _note(uid, self._workloads, self._gone_workloads, store.workloads.by_uid(uid))

    def take(
        self, most: int = SLICE_ITEMS, most_policies: int = POLICIES_TOGETHER
    ) -> Update | None:
        """Give the next part, of at most so many names, and so many more that are of policies.

        None when all is told.
        """
        while self._backlog and not self._early:
            part = self._backlog.pop()
            self._early = {uid: None for uid in part if uid not in self._workloads}
        if not self:
            return None
        store, left = self._store, most
        gone_workloads = _some(self._gone_workloads, left)
        left -= len(gone_workloads)
        gone_services = _some(self._gone_services, left)
        left -= len(gone_services)
        room = most_policies if left else 0  # none before all is gone whose addresses they judge
        policies = _some(self._policies, room)
        gone_policies = _some(self._gone_policies, room - len(policies))
        if len(policies) + len(gone_policies) == most_policies:
            left = 0
        services = _some(self._services, left)
        left -= len(services)
        workloads = _some(self._early or self._workloads, left)
        return Update(
            removed_workloads=gone_workloads,
            removed_services=gone_services,
            removed_policies=gone_policies,
            policies=_present(map(store.policies.by_key, policies)),
            services=_present(map(store.services.by_key, services)),
            workloads=_present(map(store.workloads.by_uid, workloads)),
        )


def _note(key: K, present: dict[K, None], gone: dict[K, None], value: object) -> None:
    present.pop(key, None)  # told in the order of the last changes
    gone.pop(key, None)
    (gone if value is None else present)[key] = None


def _some(names: dict[K, None], most: int) -> tuple[K, ...]:
    taken = tuple(key for key, _ in zip(names, range(most), strict=False))
    for key in taken:
        del names[key]
    return taken


V = TypeVar("V")


def _present(found: Iterable[V | None]) -> tuple[V, ...]:
    return tuple(one for one in found if one is not None)
