"""Keeps the store in line with the file of the static configuration (state-and-xds.md 14).

The file is read when it has changed and then stayed as it is for half a second. It is read in
steps, and only what differs from its last version is applied, so that connections are not held up
and what did not change is not disturbed. A file that is broken, or gone, leaves everything as it
was; the log says what is wrong, with line and field.

A control plane may know the same names. What it said last stays: what leaves the file leaves the
store only if the store still has it as the file put it there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NoReturn, TypeVar

import structlog
import trio

from ztunnel.errors import ResourceError
from ztunnel.linux.file_watch import FileWatch
from ztunnel.model.policy import Policy
from ztunnel.model.service import Service
from ztunnel.model.workload import PolicyKey, ServiceKey, Workload, WorkloadUid
from ztunnel.state.store import Store, Update
from ztunnel.transport.pace import Pace
from ztunnel.xds.local import parse_in_steps

T = TypeVar("T")
K = TypeVar("K")

log = structlog.get_logger(component="xds")

SETTLE_SECONDS = 0.5
FILE_BYTES_MAX = 64 * 1024 * 1024
ITEMS_PER_STEP = 16  # a fifth of a millisecond


class LocalConfigWatch:
    """Follows one file; `applied` is what of it is in the store.

    Make the `watch` before the file is read first, and `run` once `applied` is in the store.
    `on_load` hears whether an attempt to read a changed file went well.
    """

    def __init__(
        self,
        watch: FileWatch,
        store: Store,
        applied: Update,
        *,
        on_load: Callable[[bool], None] = lambda _: None,
        pace: Pace | None = None,
    ) -> None:
        self._watch = watch
        self._path = watch.path
        self._store = store
        self.applied = applied
        self._on_load = on_load
        self._pace = pace or Pace()

    async def run(self) -> NoReturn:
        """Follow the file until cancelled."""
        while True:
            await self._watch.changed()
            self._on_load(await self._load())

    async def _load(self) -> bool:
        """Read the file and apply what differs; say whether it is in force."""
        source = str(self._path)
        try:
            wanted = await self._parse(await trio.to_thread.run_sync(self._read), source)
        except (OSError, UnicodeDecodeError, ResourceError) as exc:
            # The old state stays, and is what the next version is compared with.
            log.error("static configuration is not used", path=source, error=str(exc))  # noqa: TRY400
            return False
        difference = difference_of(self.applied, wanted, self._store)
        self.applied = wanted
        if difference == Update():
            return True
        await self._pace.through(self._applying(difference))
        removed = difference.removed_workloads, difference.removed_services
        log.info(
            "static configuration reloaded",
            path=source,
            workloads=len(difference.workloads),
            services=len(difference.services),
            policies=len(difference.policies),
            removed=sum(map(len, (*removed, difference.removed_policies))),
        )
        return True

    async def _parse(self, text: str, source: str) -> Update:
        # The collector would walk over all nodes of a large document, again and again, to find
        # nothing: there is no cycle among them.
        is_collecting = gc.isenabled()
        wanted = Update()

        def parsing() -> Iterator[None]:
            nonlocal wanted
            wanted = yield from parse_in_steps(text, source=source)

        gc.disable()
        try:
            await self._pace.through(parsing())
        finally:
            if is_collecting:
                gc.enable()
        return wanted

    def _applying(self, difference: Update) -> Iterator[None]:
        for part in _slices(difference):
            yield from self._store.applying(part)
            yield

    def _read(self) -> str:
        with self._path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ResourceError(f"{self._path}: over {FILE_BYTES_MAX} bytes")
        return data.decode("utf-8")


def difference_of(old: Update, new: Update, store: Store) -> Update:
    """Return what turns the store from what `old` put there into what `new` says.

    What others have changed or removed since is not removed, and not put back either.
    """
    return Update(
        workloads=_changed(old.workloads, new.workloads, _uid),
        services=_changed(old.services, new.services, _key),
        policies=_changed(old.policies, new.policies, _policy_key),
        removed_workloads=_gone(old.workloads, new.workloads, _uid, store.workloads.by_uid),
        removed_services=_gone(old.services, new.services, _key, store.services.by_key),
        removed_policies=_gone(old.policies, new.policies, _policy_key, store.policies.by_key),
    )


def _uid(workload: Workload) -> WorkloadUid:
    return workload.uid


def _key(service: Service) -> ServiceKey:
    return service.key


def _policy_key(policy: Policy) -> PolicyKey:
    return policy.key


def _changed(old: Iterable[T], new: Iterable[T], key_of: Callable[[T], K]) -> tuple[T, ...]:
    before = {key_of(one): one for one in old}
    return tuple(one for one in new if before.get(key_of(one)) != one)


def _gone(
    old: Iterable[T],
    new: Iterable[T],
    key_of: Callable[[T], K],
    stored: Callable[[K], T | None],
) -> tuple[K, ...]:
    after = {key_of(one) for one in new}
    missing = ((key_of(one), one) for one in old if key_of(one) not in after)
    return tuple(key for key, one in missing if stored(key) == one)


def _slices(update: Update) -> Iterator[Update]:
    """Cut a large update; policies stay together, as some without the others may allow too much.

    They come first, so that no workload is ever open, and what is gone before what may have its
    address.
    """
    removed = update.removed_workloads, update.removed_services
    if sum(map(len, (*removed, update.services, update.workloads))) <= ITEMS_PER_STEP:
        yield update
        return
    if update.policies or update.removed_policies:
        yield Update(policies=update.policies, removed_policies=update.removed_policies)
    for gone_services in _cut(update.removed_services):
        yield Update(removed_services=gone_services)
    for gone_workloads in _cut(update.removed_workloads):
        yield Update(removed_workloads=gone_workloads)
    for services in _cut(update.services):
        yield Update(services=services)
    for workloads in _cut(update.workloads):
        yield Update(workloads=workloads)


def _cut(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while some := tuple(islice(rest, ITEMS_PER_STEP)):
        yield some
