"""The composition root: makes every collaborator once, owns the root nursery, drains on SIGTERM.

Order of start (dataplane.md 10.5): readiness first, then the state, then pods; a pod's connections
are not taken before the state is there. Order of end: listeners close, peers are told, connections
finish within the deadline, then everything is cancelled.
"""

from __future__ import annotations

import signal
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import trio

from ztunnel.admin.build import build_info
from ztunnel.admin.config_dump import (
    ListSection,
    MapSection,
    Section,
    certificate_to_dict,
    constant,
    pod_to_dict,
)
from ztunnel.admin.readiness import (
    PROXY,
    STATE_MANAGER,
    WORKERS,
    WORKLOAD_MANAGER,
    Readiness,
)
from ztunnel.admin.sections import state_sections, static_config
from ztunnel.admin.server import (
    admin_routes,
    listen,
    listen_on_loopback,
    readiness_routes,
    serve,
    stats_routes,
)
from ztunnel.config import READINESS_PORT, Config
from ztunnel.identity.issuer import make_issuer
from ztunnel.identity.node import NodeCredentials
from ztunnel.inpod.manager import PodManager, ServedPod, socket_factory
from ztunnel.inpod.zds import AgentLink, LinkState
from ztunnel.linux.file_watch import FileWatch
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.settings import ProxyMode
from ztunnel.preflight import prove_privileges, raise_descriptor_limit, read_static_config
from ztunnel.proxy.node import make_node
from ztunnel.proxy.workload_proxy import OWN_DOORS, WorkloadProxy
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.log import PIPELINE, get
from ztunnel.telemetry.metrics import Metrics, outcome_of
from ztunnel.telemetry.runtime import watch_loop
from ztunnel.transport.pace import Pace
from ztunnel.transport.reactor import Reactor
from ztunnel.wire.zds import PodInfo
from ztunnel.xds.client import xds_client
from ztunnel.xds.demand import Demand
from ztunnel.xds.local_watch import SETTLE_SECONDS, LocalConfigWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.workers.pool import WorkerPool


log = get("app")


class Application:
    """One node proxy, from configuration to exit."""

    def __init__(self, config: Config) -> None:
        """Make everything that needs no task.

        Raises:
            ConfigError: the static configuration or the development CA cannot be read.
        """
        self.config = config
        self.started = time.perf_counter()
        reactor = Reactor()
        self.pace = Pace(reactor)
        static_path = config.local_xds_path
        watch = None  # from before the file is read first
        if static_path is not None:
            watch = FileWatch(static_path, settle_seconds=SETTLE_SECONDS)
        self.static = read_static_config(config)
        self.store = Store(node=config.node_name or "")
        self.metrics = Metrics(version=config.istio_version)
        self.static_watch = None
        if watch is not None:
            on_load = outcome_of(self.metrics.static_loads)
            self.static_watch = LocalConfigWatch(
                watch, self.store, self.static, on_load=on_load, pace=self.pace
            )
        on_demand = config.xds_on_demand and config.xds_address is not None
        self.demand = Demand(self.store, metrics=self.metrics) if on_demand else None
        issuer = make_issuer(config, self.pace)
        self.credentials = NodeCredentials(config, self.store, self.metrics, issuer)
        self.certificates = self.credentials.certificates
        self.node = make_node(
            config,
            store=self.store,
            certificates=self.certificates,
            tls=self.credentials.contexts,
            metrics=self.metrics,
            demand=self.demand,
            reactor=reactor,
        )
        self.pods = PodManager(self.node)
        self.workers = self._make_workers()  # in place of `pods`, if several are wanted
        self.dedicated: WorkloadProxy | None = None
        self.own: WorkloadProxy | None = None  # in front of our own endpoints
        self.readiness = Readiness(
            STATE_MANAGER, WORKLOAD_MANAGER if config.mode is ProxyMode.SHARED else PROXY
        )
        self.draining = trio.Event()

    def _make_workers(self) -> WorkerPool | None:
        if self.config.worker_threads == 1:
            return None
        if self.config.mode is not ProxyMode.SHARED:
            log.warning("one process serves", reason="ZTUNNEL_WORKER_THREADS needs shared mode")
            return None
        from ztunnel.workers.pool import WorkerPool  # noqa: PLC0415 - few have workers

        return WorkerPool(
            self.config,
            store=self.store,
            credentials=self.credentials,
            demand=self.demand,
            metrics=self.metrics,
            on_up=self._on_workers_up,
        )

    async def run(self) -> None:
        """Serve until told to stop; then drain and return.

        Raises:
            ConfigError: a port is taken, or a privilege is missing.
        """
        raise_descriptor_limit()
        if self.config.mode is ProxyMode.SHARED:
            prove_privileges(self.config)
        async with trio.open_nursery() as root:
            root.start_soon(PIPELINE.writer.run)
            root.start_soon(watch_loop, self.metrics, self.node.reactor.take_longest_stall)
            root.start_soon(self._obey_signals, root.cancel_scope)
            async with trio.open_nursery() as services:
                await self._serve_operators(services)
                services.start_soon(self.node.reactor.run)
                await services.start(self.credentials.run)
                if self.workers is not None:  # they start while we learn the state
                    services.start_soon(self.workers.run)
                await self._learn_state(services)
                if not self.draining.is_set():
                    await self._serve(services)
                await self.draining.wait()
                await self._drain()
                services.cancel_scope.cancel()
            root.cancel_scope.cancel()
        log.info("shutdown complete")

    # Starting.

    async def _serve_operators(self, nursery: trio.Nursery) -> None:
        any_host = "::" if self.config.ipv6_enabled else "0.0.0.0"  # noqa: S104 - probes and scrapes
        async with AsyncExitStack() as undo:
            ready = await listen(any_host, READINESS_PORT, mend="another proxy runs here?")
            undo.push_async_callback(ready.aclose)
            stats = await listen(
                any_host, self.config.stats_port, mend="statsPort in PROXY_CONFIG changes it"
            )
            undo.push_async_callback(stats.aclose)
            admin = await listen_on_loopback(
                self.config.admin_port, mend="proxyAdminPort in PROXY_CONFIG changes it"
            )
            undo.pop_all()
        workers = self.workers
        pages = admin_routes(
            sections=self._sections(),
            levels=workers or PIPELINE,
            shut_down=self.draining.set,
            prepare=None if workers is None else workers.gather_connections,
        )
        exposed = stats_routes(self.metrics)
        if workers is not None:
            exposed = stats_routes(workers, workers.gather_metrics)
        for component, listeners, routes in (
            ("readiness", [ready], readiness_routes(self.readiness)),
            ("stats", [stats], exposed),
            ("admin", admin, pages),
        ):
            for listener in listeners:
                address = listener.socket.getsockname()
                log.info(
                    "listener established",
                    address=f"{address[0]}:{address[1]}",
                    component=component,
                )
            await nursery.start(
                partial(serve, listeners, routes, draining=self.draining, pace=self.pace)
            )

    async def _learn_state(self, nursery: trio.Nursery) -> None:
        """Take the static configuration, then wait for the control plane if there is one.

        Returns early when we are told to stop: a control plane that is down must not keep us.
        """
        self.store.apply(self.static)
        if self.static_watch is not None:
            nursery.start_soon(self.static_watch.run)
        if self.static != Update():
            log.info(
                "static configuration loaded",
                workloads=len(self.static.workloads),
                services=len(self.static.services),
                policies=len(self.static.policies),
            )
        if self.config.xds_address is not None:
            synced = trio.Event()
            client = xds_client(
                self.config,
                self.store,
                metrics=self.metrics,
                rng=self.node.rng,
                on_ready=synced.set,
                demand=self.demand,
                pace=self.pace,
            )
            nursery.start_soon(client.run)
            await self._until_draining(synced.wait)
            if not synced.is_set():
                return
        self._ready(STATE_MANAGER)

    async def _serve(self, nursery: trio.Nursery) -> None:
        if self.config.mode is ProxyMode.SHARED:
            await self._serve_pods(nursery)
        else:
            await self._serve_one(nursery)

    async def _serve_pods(self, nursery: trio.Nursery) -> None:
        handler = self.workers or self.pods
        if self.workers is not None:
            await self._until_draining(self.workers.begin)
        else:
            await nursery.start(self.pods.run)
        if self.draining.is_set():
            return
        await self._serve_ourselves(nursery)
        link = AgentLink(str(self.config.inpod_socket), handler, on_state=self._on_link_state)
        nursery.start_soon(self._until_draining, link.run)

    async def _serve_ourselves(self, nursery: trio.Nursery) -> None:
        """Take tunnels to our own pod, so that the mesh can scrape us by its rules (3.11)."""
        config = self.config
        if not (config.pod_name and config.pod_namespace and config.service_account):
            await trio.lowlevel.checkpoint()
            return
        info = PodInfo(
            config.pod_name, Namespace(config.pod_namespace), ServiceAccount(config.service_account)
        )
        proxy = self.own = WorkloadProxy(self.node, info, socket_factory(config, None, own=True))
        proxy.start(OWN_DOORS)
        await nursery.start(proxy.run)

    async def _serve_one(self, nursery: trio.Nursery) -> None:
        info = self.config.workload_info
        assert info is not None
        pod = PodInfo(info.name, info.namespace, info.service_account)
        proxy = WorkloadProxy(self.node, pod, socket_factory(self.config, None))
        proxy.start()
        self.dedicated = proxy
        await nursery.start(proxy.run)
        self._ready(PROXY)

    async def _until_draining(self, work: Callable[[], Awaitable[object]]) -> None:
        """Run `work` to its end, or until we are told to stop."""

        async def run(scope: trio.CancelScope) -> None:
            await work()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, nursery.cancel_scope)
            await self.draining.wait()
            nursery.cancel_scope.cancel()

    # Ending.

    async def _obey_signals(self, everything: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            interrupted = False
            async for number in signals:
                if number == signal.SIGHUP:
                    # The reference dies of it; there is nothing to reload (dataplane.md 17.57).
                    log.info("SIGHUP ignored")
                    continue
                log.info("shutting down", signal=signal.Signals(number).name)
                if interrupted and number == signal.SIGINT:
                    everything.cancel()
                interrupted = interrupted or number == signal.SIGINT
                self.draining.set()

    async def _drain(self) -> None:
        seconds = self.config.drain_seconds
        log.info("draining", deadline_seconds=seconds)
        async with trio.open_nursery() as nursery:
            nursery.start_soon((self.workers or self.pods).drain, seconds)
            for proxy in (self.dedicated, self.own):
                if proxy is not None:
                    nursery.start_soon(proxy.drain, seconds)

    # Telling.

    def _on_link_state(self, state: LinkState) -> None:
        self.metrics.pending_proxies.set(len(state.pending))
        if state.is_ready:
            self._ready(WORKLOAD_MANAGER)
        else:
            self.readiness.register(WORKLOAD_MANAGER)

    def _on_workers_up(self, is_any_up: bool) -> None:  # noqa: FBT001 - a callback
        if is_any_up:
            self._ready(WORKERS)
        else:
            self.readiness.register(WORKERS)

    def _ready(self, task: str) -> None:
        left = self.readiness.clear(task)
        if left is not None:
            seconds = time.perf_counter() - self.started
            log.info("readiness task done", task=task, seconds=round(seconds, 3), left=left)

    def _sections(self) -> dict[str, Section]:
        return {
            **state_sections(self.store),
            "certificates": ListSection(
                items=self.certificates.snapshot,
                key=lambda one: str(one.identity),
                show=certificate_to_dict,
            ),
            "workloadState": (
                MapSection(items=lambda: list(self.pods.pods.items()), show=_show_pod)
                if self.workers is None
                else self.workers.section()
            ),
            "stagedServices": constant(dict),
            "staticConfig": constant(lambda: static_config(self._static_in_force(), self.store)),
            "version": constant(partial(build_info, self.config)),
            "config": constant(self.config.to_dump),
        }

    def _static_in_force(self) -> Update:
        return self.static if self.static_watch is None else self.static_watch.applied


def _show_pod(pod: ServedPod) -> dict[str, object]:
    live = pod.proxy.context.live
    return pod_to_dict(
        name=pod.info.name,
        namespace=pod.info.namespace,
        service_account=pod.info.service_account,
        inbound=list(live.inbound),
        outbound=list(live.outbound),
        is_up=True,
    )


async def run(config: Config) -> None:
    """Run the node proxy to its end.

    Raises:
        ConfigError: it could not start.
    """
    await Application(config).run()
