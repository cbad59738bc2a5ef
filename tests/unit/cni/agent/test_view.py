from __future__ import annotations

import trio
import trio.testing

from cni.agent.mirror import Changed, Removed
from cni.agent.objects import KubeNamespace, NamespaceUid
from cni.agent.view import ClusterView
from tests.support.node_world import SHOP, A, a_kube_pod
from ztunnel.model.identity import Namespace


def a_namespace(name: str, **labels: str) -> Changed[KubeNamespace]:
    namespace = KubeNamespace(uid=NamespaceUid(name), name=Namespace(name), labels=labels)
    return Changed(namespace, None)


def test_pods_are_found_by_uid_and_by_name() -> None:
    view = ClusterView()
    assert view.take_pods([Changed(a_kube_pod(), None)]) == {A}
    assert view.pod(A) == view.pod_named("shop", "a") == a_kube_pod()
    assert view.take_pods([Removed(a_kube_pod())]) == {A}
    assert view.pod(A) is view.pod_named("shop", "a") is None


def test_the_end_of_an_older_pod_leaves_its_successor_of_the_same_name() -> None:
    view = ClusterView()
    newer = a_kube_pod("new", name="a")
    view.take_pods([Changed(a_kube_pod(), None), Changed(newer, None), Removed(a_kube_pod())])
    assert view.pod_named("shop", "a") == newer


def test_a_namespace_touches_its_pods_only_if_its_labels_changed() -> None:
    view = ClusterView()
    view.take_pods([Changed(a_kube_pod(), None), Changed(a_kube_pod("b", namespace="x"), None)])
    assert view.labels_of(SHOP) is None
    assert view.take_namespaces([a_namespace("shop", mode="x")]) == {A}
    assert view.take_namespaces([a_namespace("shop", mode="x")]) == set()
    assert view.take_namespaces([Removed(a_namespace("shop").item)]) == {A}
    assert view.labels_of(SHOP) is None


async def test_a_change_wakes_whoever_waits() -> None:
    view = ClusterView()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(view.wait_change)
        await trio.testing.wait_all_tasks_blocked()
        view.take_pods([])
