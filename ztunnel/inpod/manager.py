"""Whom we serve: one proxy per pod of this node, each in its own cancel scope (cni.md 6.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import ZtunnelError
from ztunnel.linux import sockopt
from ztunnel.proxy.workload_proxy import WorkloadProxy
from ztunnel.telemetry.log import get
from ztunnel.transport.sockets import SocketFactory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ztunnel.config import Config
    from ztunnel.linux.netns import PodNetns
    from ztunnel.model.workload import PodUid
    from ztunnel.proxy.context import NodeContext
    from ztunnel.wire.zds import PodInfo

log = get("inpod")

REPLACE_SECONDS = 1.0  # between a proxy that failed and the next


@dataclass(slots=True, kw_only=True, eq=False)
class ServedPod:
    """A pod and its running proxy; owns the namespace descriptor."""

    info: PodInfo
    netns: PodNetns
    proxy: WorkloadProxy
    scope: trio.CancelScope
    stopped: trio.Event


class PodManager:
    """Starts, keeps and stops proxies as the node agent says; the handler of its link."""

    def __init__(self, node: NodeContext, *, on_change: Callable[[], None] | None = None) -> None:
        self._node = node
        self._pods: dict[PodUid, ServedPod] = {}
        self._workloads: trio.Nursery | None = None
        self._on_change = on_change
        self._ended = trio.Event()

    def __len__(self) -> int:
        return len(self._pods)

    @property
    def pods(self) -> Mapping[PodUid, ServedPod]:
        """The pods served now."""
        return self._pods

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all pods until cancelled."""
        async with trio.open_nursery() as nursery:
            self._workloads = nursery
            task_status.started()
            await trio.sleep_forever()

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Serve a pod; returns when its listeners are bound, and then owns `netns`.

        Raises:
            ZtunnelError | OSError: it cannot be served now; `netns` stays the caller's.
        """
        known = self._pods.get(uid)
        if known is not None:
            if known.netns.id == netns.id:
                netns.close()
                await trio.lowlevel.checkpoint()
                return
            await self._stop(uid, known)
        assert self._workloads is not None
        proxy = self._make(info, netns)
        proxy.start()
        pod = ServedPod(
            info=info, netns=netns, proxy=proxy, scope=trio.CancelScope(), stopped=trio.Event()
        )
        self._pods[uid] = pod
        await self._workloads.start(self._serve_pod, uid, pod)
        self._node.metrics.proxies_started.add(1)
        self._changed()
        log.info("pod received", uid=uid, name=info.name, namespace=info.namespace)

    async def remove(self, uid: PodUid) -> None:
        """Stop serving a pod at once; unknown pods are fine."""
        pod = self._pods.get(uid)
        if pod is None:
            await trio.lowlevel.checkpoint()
            return
        await self._stop(uid, pod)
        log.info("pod deleted", uid=uid, name=pod.info.name, namespace=pod.info.namespace)

    async def reconcile(self, keep: frozenset[PodUid]) -> None:
        """Stop serving every pod that is not in `keep`."""
        for uid in [uid for uid in self._pods if uid not in keep]:
            await self.remove(uid)
        await trio.lowlevel.checkpoint()

    async def drain(self, seconds: float) -> None:
        """Let every pod's connections finish within `seconds`, all pods in parallel."""
        async with trio.open_nursery() as nursery:
            for pod in self._pods.values():
                nursery.start_soon(pod.proxy.drain, seconds)

    async def _serve_pod(
        self,
        uid: PodUid,
        pod: ServedPod,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        task_status.started()
        try:
            with pod.scope:
                await self._keep_running(pod)
        finally:
            pod.netns.close()
            if self._pods.get(uid) is pod:
                del self._pods[uid]
            self._node.metrics.proxies_stopped.add(1)
            self._changed()
            pod.stopped.set()

    async def _keep_running(self, pod: ServedPod) -> None:
        """Run the pod's proxy until cancelled; after a bug of ours, one that takes its place.

        The bug cuts the connections of this pod, and of no other.
        """
        while True:
            try:
                await pod.proxy.run()
            except* Exception:
                log.exception(
                    "the proxy of a pod failed unexpectedly",
                    name=pod.info.name,
                    namespace=pod.info.namespace,
                )
            while not await self._replace(pod):
                pass

    async def _replace(self, pod: ServedPod) -> bool:
        await trio.sleep(REPLACE_SECONDS)
        proxy = self._make(pod.info, pod.netns)
        try:
            proxy.start()
        except (ZtunnelError, OSError) as error:
            log.warning("pod cannot be served again yet", name=pod.info.name, error=str(error))
            return False
        pod.proxy = proxy
        return True

    def _make(self, info: PodInfo, netns: PodNetns) -> WorkloadProxy:
        return WorkloadProxy(self._node, info, socket_factory(self._node.config, netns))

    async def _stop(self, uid: PodUid, pod: ServedPod) -> None:
        if self._pods.get(uid) is pod:
            del self._pods[uid]
        pod.scope.cancel()
        await pod.stopped.wait()

    def _changed(self) -> None:
        self._node.metrics.active_proxies.set(len(self._pods))
        if self._on_change is not None:
            self._on_change()


def socket_factory(config: Config, netns: PodNetns | None, *, own: bool = False) -> SocketFactory:
    """Make sockets for a pod, or in our own namespace when `netns` is None.

    `own` ones are for our own endpoints, which nothing redirects: they carry no mark.
    """
    keepalive = None
    if config.keepalive_enabled:
        keepalive = sockopt.KeepaliveSettings(
            idle_seconds=max(1, round(config.keepalive_time_seconds)),
            interval_seconds=max(1, round(config.keepalive_interval_seconds)),
            retries=config.keepalive_retries,
        )
    return SocketFactory(
        netns=netns,
        mark=None if own else config.packet_mark,
        keepalive=keepalive,
        user_timeout=config.user_timeout_enabled,
        port_reuse=config.inpod_port_reuse if netns is not None else False,
        ipv6=config.ipv6_enabled,
    )
