"""All workers of a node: kept running, fed, and seen from outside as one proxy.

How it works: the control process talks to the control plane, the CA and the node agent, and serves
operators; connections are moved by workers. Each of them listens in every pod, with SO_REUSEPORT,
so the kernel deals connections out by a hash of their addresses, and DNS queries as well. A worker
that ends is replaced; its listeners go with it, so that new connections go to the others meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import TYPE_CHECKING

import trio

from ztunnel.admin.config_dump import Large, Many, MapSection, pod_to_dict
from ztunnel.errors import ConfigError, UnreachableError
from ztunnel.model.workload import PodUid
from ztunnel.telemetry.exposition import Family, Kind
from ztunnel.telemetry.log import PIPELINE, get
from ztunnel.telemetry.metrics import UNSTABLE
from ztunnel.workers.handle import Control, WorkerHandle
from ztunnel.workers.messages import Certified, Connected, Levels, Lists
from ztunnel.workers.pod_keeper import WantedPod
from ztunnel.workers.process import WorkerProcess
from ztunnel.workers.tally import Exposition, Tally
from ztunnel.xds.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from ztunnel.config import Config
    from ztunnel.identity.node import NodeCredentials
    from ztunnel.linux.netns import PodNetns
    from ztunnel.model.identity import Identity
    from ztunnel.proxy.context import AddressSource
    from ztunnel.state.store import Store
    from ztunnel.telemetry.filter import LogFilter
    from ztunnel.telemetry.metrics import Metrics
    from ztunnel.tls.certificate import WorkloadCertificate
    from ztunnel.wire.zds import PodInfo

log = get("workers")

SERVE_SECONDS = 30.0  # how long the node agent waits for a pod while workers are being replaced
REPORT_SECONDS = 2.0  # how long an operator waits for a worker that does not answer
DRAIN_MARGIN_SECONDS = 2.0


class WorkerPool:
    """Keeps a node's workers; the handler of the node agent's link, as `inpod.PodManager` is."""

    def __init__(
        self,
        config: Config,
        *,
        store: Store,
        credentials: NodeCredentials,
        demand: AddressSource | None,
        metrics: Metrics,
        on_up: Callable[[bool], None],
    ) -> None:
        """`on_up` hears whether any worker is up, each time that changes."""
        self._count = config.worker_threads
        self._credentials = credentials
        self._metrics = metrics
        self._on_up = on_up
        self._was_up = False
        self._pods: dict[PodUid, WantedPod] = {}
        self._control = Control(
            config=config,
            store=store,
            certificates=credentials.certificates,
            revocations=credentials.revocations,
            demand=demand,
            pods=self._pods,
            synced=trio.Event(),
            changed=self._on_progress,
        )
        self._handles: dict[int, WorkerHandle] = {}
        self._tried: set[int] = set()  # those that were up, or have failed to come up, once
        self._progress = trio.Event()
        self._is_draining = False
        self._tally = Tally()
        self._connections: dict[PodUid, list[Connected]] = {}
        self._restarts = Family(
            "ztunnel_worker_restarts", "Workers that ended and were replaced" + UNSTABLE,
            labels=("worker",),
        )  # fmt: skip
        self._up = Family(
            "ztunnel_worker_up", "Whether a worker serves" + UNSTABLE,
            kind=Kind.GAUGE, labels=("worker",),
        )  # fmt: skip
        self._opened = Family(
            "ztunnel_worker_connections_opened", "Connections by worker" + UNSTABLE,
            labels=("worker",),
        )  # fmt: skip
        metrics.register([self._restarts, self._up, self._opened])

    # Running.

    async def run(self) -> None:
        """Keep the workers until cancelled; they take pods once we have been told to `begin`."""
        with ExitStack() as undo:
            self._credentials.on_certificate = self._on_certificate
            if self._credentials.revocations is not None:
                undo.callback(self._credentials.revocations.subscribe(self._on_lists))
            async with trio.open_nursery() as nursery:
                for number in range(self._count):
                    nursery.start_soon(self._keep, number)

    async def begin(self) -> None:
        """Let pods be served: the store is filled. Waits until each worker was up or has failed."""
        await trio.lowlevel.checkpoint()
        self._control.synced.set()
        while len(self._tried) < self._count:
            await self._wait_progress()

    async def _keep(self, number: int) -> None:
        """Have one worker run, and another in its place when it ends, until we drain."""
        backoff = Backoff(Random())  # noqa: S311 - spreads restarts, keeps no secret
        while True:
            began = trio.current_time()
            how = await self._run_one(number)
            if self._is_draining:
                return
            wait = backoff.after(trio.current_time() - began)
            self._restarts.count(str(number)).add()
            log.error("worker ended", worker=number, how=how, retry_seconds=round(wait, 3))
            await trio.sleep(wait)

    async def _run_one(self, number: int) -> str:
        try:
            process = WorkerProcess.start()
        except OSError as error:
            await trio.lowlevel.checkpoint()
            return f"cannot be started: {error}"
        log.info("worker started", worker=number, pid=process.pid)
        handle = self._handles[number] = WorkerHandle(number, process, self._control)
        try:
            return await handle.run()
        finally:
            del self._handles[number]
            self._tally.bury(number)
            self._tried.add(number)
            self._on_progress()

    def _on_progress(self) -> None:
        for number in range(self._count):
            handle = self._handles.get(number)
            is_up = handle is not None and handle.is_up
            self._up.count(str(number)).set(is_up)
            if is_up:
                self._tried.add(number)
        is_any_up = bool(self._serving())
        if is_any_up != self._was_up:
            self._was_up = is_any_up
            self._on_up(is_any_up)
        self._progress.set()
        self._progress = trio.Event()

    async def _wait_progress(self) -> None:
        await self._progress.wait()

    def _serving(self) -> list[WorkerHandle]:
        return [handle for handle in self._handles.values() if handle.is_up]

    # Telling all of them.

    def _on_certificate(self, identity: Identity, certificate: WorkloadCertificate | None) -> None:
        for handle in self._handles.values():
            handle.tell_if_ready(Certified(identity, certificate))

    def _on_lists(self) -> None:
        assert self._credentials.revocations is not None
        lists = Lists(self._credentials.revocations.in_force())
        for handle in self._handles.values():
            handle.tell_if_ready(lists)

    def change(self, filter_text: str = "", *, reset: bool = False) -> LogFilter:
        """Change the log's levels, here and in all workers; see `telemetry.log.Pipeline`.

        Raises:
            ValueError: the text is not a filter; nothing has changed.
        """
        changed = PIPELINE.change(filter_text, reset=reset)
        for handle in self._handles.values():
            handle.tell_if_ready(Levels(str(changed)))
        return changed

    # Pods: what `inpod.zds` asks of its handler.

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Have all workers serve a pod; returns when their listeners are bound, and owns `netns`.

        A worker that ends meanwhile is not waited for: another will serve the pod in its place.

        Raises:
            ConfigError | UnreachableError: a worker cannot serve it, or none does in time; none
                serves it then, and `netns` stays the caller's.
        """
        known = self._pods.get(uid)
        if known is not None:
            if known.netns.id == netns.id:
                netns.close()
                await trio.lowlevel.checkpoint()
                return
            await self.remove(uid)
        pod = self._pods[uid] = WantedPod(info, netns)
        try:
            self._kick()
            await self._until_served(uid, pod)
        except BaseException:
            del self._pods[uid]
            self._kick()
            raise
        self._metrics.proxies_started.add(1)
        self._metrics.active_proxies.set(len(self._pods))

    async def remove(self, uid: PodUid) -> None:
        """Have no worker serve a pod any more; unknown pods are fine."""
        pod = self._pods.pop(uid, None)
        await trio.lowlevel.checkpoint()
        if pod is None:
            return
        pod.netns.close()
        self._metrics.proxies_stopped.add(1)
        self._metrics.active_proxies.set(len(self._pods))
        self._kick()
        # A worker that does not obey is ended by its handle.
        while any(handle.pods.knows(uid) for handle in self._serving()):
            await self._wait_progress()

    async def reconcile(self, keep: frozenset[PodUid]) -> None:
        """Stop serving every pod that is not in `keep`."""
        for uid in [uid for uid in self._pods if uid not in keep]:
            await self.remove(uid)
        await trio.lowlevel.checkpoint()

    async def drain(self, seconds: float) -> None:
        """Let connections finish within `seconds` in all workers, and replace none any more."""
        self._is_draining = True
        with trio.move_on_after(seconds + DRAIN_MARGIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for handle in self._handles.values():
                    nursery.start_soon(handle.drain, seconds)

    async def _until_served(self, uid: PodUid, pod: WantedPod) -> None:
        with trio.move_on_after(SERVE_SECONDS):
            while True:
                standings = [handle.pods.standing(uid, pod) for handle in self._serving()]
                for problem in filter(None, standings):
                    raise ConfigError(problem)
                if standings and None not in standings:
                    await trio.lowlevel.checkpoint()
                    return
                await self._wait_progress()
        raise UnreachableError(f"no worker serves the pod within {SERVE_SECONDS:g} s")

    def _kick(self) -> None:
        for handle in self._handles.values():
            handle.pods.look()

    # Showing.

    def text(self) -> Iterator[str]:
        """Print the metrics of all processes as those of one, as of the last `gather_metrics`."""
        for number in range(self._count):
            self._opened.count(str(number)).set(self._tally.opened(number))
        yield from self._tally.text(self._metrics.text())

    async def gather_metrics(self) -> None:
        """Ask all workers for their metrics; what one said before counts if it does not answer."""
        await self._ask_all(self._gather_metrics)

    async def gather_connections(self) -> None:
        """Ask all workers for their connections; none are shown of one that does not answer."""
        found: dict[PodUid, list[Connected]] = {}
        self._connections = found

        async def gather(handle: WorkerHandle) -> None:
            await handle.show_connections(
                lambda piece: found.setdefault(PodUid(piece.uid), []).append(piece)
            )

        await self._ask_all(gather)

    def section(self) -> MapSection:
        """Make the part of the configuration dump about pods, as of `gather_connections`."""
        return MapSection(
            items=lambda: [(uid, (uid, pod)) for uid, pod in self._pods.items()],
            show=lambda named: self._show(*named),
        )

    async def _gather_metrics(self, handle: WorkerHandle) -> None:
        metrics = Exposition()
        if await handle.show_metrics(metrics.feed) and handle.is_up:
            self._tally.told(handle.number, metrics)

    async def _ask_all(self, ask: Callable[[WorkerHandle], Awaitable[None]]) -> None:
        with trio.move_on_after(REPORT_SECONDS):
            async with trio.open_nursery() as nursery:
                for handle in self._serving():
                    nursery.start_soon(ask, handle)

    def _show(self, uid: PodUid, pod: WantedPod) -> dict[str, object]:
        is_up = any(handle.pods.standing(uid, pod) == "" for handle in self._serving())
        shown = pod_to_dict(
            name=pod.info.name,
            namespace=pod.info.namespace,
            service_account=pod.info.service_account,
            inbound=(),
            outbound=(),
            is_up=is_up,
        )
        if is_up:
            pieces = self._connections.get(uid, [])
            shown["connections"] = Large(
                inbound=_as_they_are([one for piece in pieces for one in piece.inbound]),
                outbound=_as_they_are([one for piece in pieces for one in piece.outbound]),
            )
        return shown


def _as_they_are(connections: list[dict[str, str | None]]) -> Many:
    return Many(items=connections, show=lambda one: one)
