"""What Kubernetes says about this node's pods and all namespaces, as one thing to ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import trio

from cni.agent.mirror import Change, Removed
from cni.agent.objects import KubeNamespace, KubePod
from ztunnel.model.identity import Namespace
from ztunnel.model.workload import PodUid


class ClusterView:
    """Pods by uid and name, labels by namespace. Fed with changes; wakes whoever waits for one."""

    def __init__(self) -> None:
        self._pods: dict[PodUid, KubePod] = {}
        self._uids: dict[tuple[str, str], PodUid] = {}
        self._labels: dict[Namespace, Mapping[str, str]] = {}
        self._changed = trio.Event()

    @property
    def pods(self) -> Iterable[KubePod]:
        """All pods of this node."""
        return self._pods.values()

    def pod(self, uid: PodUid) -> KubePod | None:
        """Give a pod by its uid."""
        return self._pods.get(uid)

    def pod_named(self, namespace: str, name: str) -> KubePod | None:
        """Give the pod that has a name now."""
        uid = self._uids.get((namespace, name))
        return self._pods.get(uid) if uid is not None else None

    def labels_of(self, namespace: Namespace) -> Mapping[str, str] | None:
        """Give a namespace's labels; None if we do not know it."""
        return self._labels.get(namespace)

    def take_pods(self, changes: Iterable[Change[KubePod]]) -> set[PodUid]:
        """Take changes of pods; return whose."""
        touched: set[PodUid] = set()
        for change in changes:
            pod = change.item
            touched.add(pod.uid)
            if isinstance(change, Removed):
                self._pods.pop(pod.uid, None)
                if self._uids.get((pod.namespace, pod.name)) == pod.uid:
                    del self._uids[pod.namespace, pod.name]
            else:
                self._pods[pod.uid] = pod
                self._uids[pod.namespace, pod.name] = pod.uid
        self._wake()
        return touched

    def take_namespaces(self, changes: Iterable[Change[KubeNamespace]]) -> set[PodUid]:
        """Take changes of namespaces; return the pods for which something may be different."""
        touched: set[Namespace] = set()
        for change in changes:
            name = change.item.name
            before = self._labels.get(name)
            if isinstance(change, Removed):
                self._labels.pop(name, None)
            else:
                self._labels[name] = change.item.labels
            if before != self._labels.get(name):
                touched.add(name)
        self._wake()
        return {pod.uid for pod in self._pods.values() if pod.namespace in touched}

    async def wait_change(self) -> None:
        """Wait until something is different."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
