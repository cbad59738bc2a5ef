"""Which identities live on this node: fetch early, forget late (dataplane.md 8.5).

`LocalIdentities`, a core, is told what became of each workload and answers whom to prefetch; it
remembers who left, and names an identity to be forgotten a minute after its last workload. So a
one-pod deployment that rolls does not fetch twice (17.42), and nothing is lost in a queue (17.41).
`Prefetcher` is the shell around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from ztunnel.model.workload import TunnelProtocol, Workload, WorkloadUid

if TYPE_CHECKING:
    from ztunnel.model.identity import Identity
    from ztunnel.state.store import Changes, Store

log = structlog.get_logger()

FORGET_SECONDS = 60.0


class LocalIdentities:
    """Counts the workloads of this node by identity.

    `node` "" counts every workload as ours and prefetches none, as in the reference.
    """

    def __init__(self, node: str, *, forget_seconds: float = FORGET_SECONDS) -> None:
        self._node = node
        self._forget_seconds = forget_seconds
        self._identities: dict[WorkloadUid, Identity] = {}
        self._workloads: dict[Identity, set[WorkloadUid]] = {}
        self._leaving: dict[Identity, float] = {}  # in the order of their times

    def changed(self, uid: WorkloadUid, workload: Workload | None, now: float) -> Identity | None:
        """Note what a workload is now, None if it is gone; give the identity to prefetch."""
        is_ours = workload is not None and (not self._node or workload.node == self._node)
        identity = workload.identity if workload is not None and is_ours else None
        before = self._identities.get(uid)
        if identity != before:
            self._leave(uid, before, now)
            self._enter(uid, identity)
        if workload is None or identity is None or not self._node:
            return None
        wanted = workload.protocol is TunnelProtocol.HBONE or workload.native_tunnel
        return identity if wanted else None

    def take_forgotten(self, now: float) -> list[Identity]:
        """Give the identities that have had no workload here for long enough; each once."""
        taken = []
        for identity, due in self._leaving.items():
            if due > now:
                break
            taken.append(identity)
        for identity in taken:
            del self._leaving[identity]
        return taken

    def next_due(self) -> float:
        """Give the time of the next identity to forget; infinity if there is none."""
        return next(iter(self._leaving.values()), math.inf)

    def _enter(self, uid: WorkloadUid, identity: Identity | None) -> None:
        if identity is not None:
            self._identities[uid] = identity
            self._workloads.setdefault(identity, set()).add(uid)
            self._leaving.pop(identity, None)

    def _leave(self, uid: WorkloadUid, identity: Identity | None, now: float) -> None:
        if identity is None:
            return
        del self._identities[uid]
        workloads = self._workloads[identity]
        workloads.discard(uid)
        if not workloads:
            del self._workloads[identity]
            self._leaving[identity] = now + self._forget_seconds


class Keeper(Protocol):
    """Who holds certificates."""

    def prefetch(self, identity: Identity) -> None:
        """Fetch a certificate that will probably be needed soon."""

    def forget(self, identity: Identity) -> None:
        """Drop the certificate of an identity."""


class Prefetcher:
    """Follows the store; `forget` is called beside the keeper's own, for what else is cached."""

    def __init__(
        self,
        store: Store,
        keeper: Keeper,
        identities: LocalIdentities,
        *,
        forget: Callable[[Identity], None],
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._identities = identities
        self._forget = forget
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch and forget until cancelled; what is in the store already counts."""
        stop = self._store.subscribe(self._on_change)
        try:
            now = trio.current_time()
            for workload in list(self._store.workloads.all()):
                self._note(workload.uid, workload, now)
            task_status.started()
            while True:
                nap = max(0.0, self._identities.next_due() - trio.current_time())
                with trio.move_on_after(nap):
                    await self._changed.wait()
                self._changed = trio.Event()
                for identity in self._identities.take_forgotten(trio.current_time()):
                    log.debug("identity forgotten", identity=str(identity))
                    self._keeper.forget(identity)
                    self._forget(identity)
        finally:
            stop()

    def _on_change(self, changes: Changes) -> None:
        now = trio.current_time()
        for uid in changes.workloads:
            self._note(uid, self._store.workloads.by_uid(uid), now)
        if changes.workloads:
            self._changed.set()

    def _note(self, uid: WorkloadUid, workload: Workload | None, now: float) -> None:
        wanted = self._identities.changed(uid, workload, now)
        if wanted is not None:
            self._keeper.prefetch(wanted)
