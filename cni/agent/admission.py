"""Whether a pod may start: what the plugin's event leads to (cni.md 3.4, `cni.plugin.event`).

How it works: the runtime is often faster than our watch, so a pod that we do not know is waited for
a moment and then fetched. The reference's plugin sends no uid: then the pod is always fetched,
because the one we remember may be an older one of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from cni.agent.eligibility import Decision, Eligibility
from cni.agent.errors import KubeError, PodUnknownError
from cni.agent.kube import fetch_pod
from cni.agent.kube_http import KubeClient
from cni.agent.objects import KubePod
from cni.agent.plugin_events import PluginEvent
from cni.agent.pod_netns import NodeView
from cni.agent.reconcile import Offer, Reconciler
from cni.agent.view import ClusterView
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace
from ztunnel.model.workload import PodUid

WATCH_PATIENCE_SECONDS = 0.3
FETCH_SECONDS = 2.0


class Admission:
    """Answers events."""

    def __init__(
        self,
        *,
        view: ClusterView,
        client: KubeClient,
        eligibility: Eligibility,
        reconciler: Reconciler,
        node: NodeView,
    ) -> None:
        self._view = view
        self._client = client
        self._eligibility = eligibility
        self._reconciler = reconciler
        self._node = node

    async def admit(self, event: PluginEvent, netns: PodNetns | None) -> None:
        """Return when the pod may start. `netns` is taken over, in every outcome.

        Raises:
            ZtunnelError: it must not start.
        """
        try:
            pod = await self._pod(event)
            labels = await self._labels(pod.namespace)
            verdict = self._eligibility.judge(pod, labels)
            if verdict.decision is Decision.UNKNOWN:
                raise PodUnknownError(f"namespace {pod.namespace} is not known yet")
            if verdict.decision is Decision.OUT:
                return
            netns = await self._checked(event, netns)
            offer = Offer(pod, netns, event.ips)
            netns = None
        finally:
            if netns is not None:
                netns.close()
        await self._reconciler.admit(offer)

    async def _checked(self, event: PluginEvent, netns: PodNetns | None) -> PodNetns:
        """Give the sandbox's namespace, once it is sure that it can be the pod's."""
        opened = netns or self._node.open_reported(event.netns)
        try:
            await trio.to_thread.run_sync(self._node.check, opened, event.ips)
        except BaseException:
            opened.close()
            raise
        return opened

    async def _pod(self, event: PluginEvent) -> KubePod:
        if event.uid:
            with trio.move_on_after(WATCH_PATIENCE_SECONDS):
                while self._view.pod(PodUid(event.uid)) is None:
                    await self._view.wait_change()
        known = self._view.pod(PodUid(event.uid)) if event.uid else None
        return known or await self._fetched(event)

    async def _fetched(self, event: PluginEvent) -> KubePod:
        full_name = f"{event.namespace}/{event.name}"
        pod: KubePod | None = None
        failure = "Kubernetes does not answer"
        try:
            with trio.move_on_after(FETCH_SECONDS):
                pod = await fetch_pod(self._client, event.namespace, event.name)
                failure = "there is no such pod"
        except KubeError as exc:
            failure = str(exc)
        if pod is None:
            raise PodUnknownError(f"pod {full_name} is not known: {failure}")
        if event.uid and pod.uid != event.uid:
            raise PodUnknownError(f"pod {full_name} is another one by now: {pod.uid}")
        return pod

    async def _labels(self, namespace: Namespace) -> Mapping[str, str] | None:
        with trio.move_on_after(WATCH_PATIENCE_SECONDS):
            while self._view.labels_of(namespace) is None:
                await self._view.wait_change()
        await trio.lowlevel.checkpoint()
        return self._view.labels_of(namespace)
