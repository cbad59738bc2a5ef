from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from cni.agent.admission import Admission
from cni.agent.eligibility import Eligibility
from cni.agent.errors import NetnsError, PodUnknownError
from cni.agent.kube_http import KubeClient
from cni.agent.mirror import Changed
from cni.agent.objects import decode_pod
from cni.agent.plugin_events import PluginEvent
from cni.agent.pod_netns import NodeView
from tests.support.kube import FakeKube, a_pod, running
from tests.support.namespaces import needs_root, open_descriptors
from tests.support.node_world import SHOP, A, Agent, World, a_kube_pod
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.linux.netns import NetnsId, PodNetns

EVENT = PluginEvent(netns="/missing", name="a", namespace=SHOP, ips=(), uid="a")


class Scene:
    """A world with an agent, and a Kubernetes API that may know more than its watch."""

    def __init__(self, world: World, kube: FakeKube) -> None:
        assert kube.server is not None
        self.world = world
        self.kube = kube
        self.agent = Agent(world)
        self.admission = Admission(
            view=self.agent.view,
            client=KubeClient(kube.server),
            eligibility=Eligibility(),
            reconciler=self.agent.reconciler,
            node=NodeView(Path("/proc"), (Path("/"),), NetnsId(0, 0)),
        )

    async def admit(self, event: PluginEvent = EVENT, netns: PodNetns | None = None) -> None:
        with trio.fail_after(10):
            await self.admission.admit(event, netns)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running(FakeKube()) as kube:
        scene = Scene(World(tmp_path), kube)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.agent.reconciler.run)
            yield scene
            nursery.cancel_scope.cancel()
        scene.agent.reconciler.close()


async def test_a_pod_outside_the_mesh_may_start(scene: Scene) -> None:
    scene.world.mesh = False
    scene.world.add_pod(a_kube_pod())
    scene.agent.learn()
    before = open_descriptors()
    await scene.admit()
    await scene.admit(netns=PodNetns.open("/proc/self/ns/net"))
    assert open_descriptors() == before
    assert scene.world.calls == []


async def test_a_pod_nobody_knows_must_wait(scene: Scene) -> None:
    with pytest.raises(PodUnknownError, match="no such pod"):
        await scene.admit()
    scene.kube.refuse = [500]
    with pytest.raises(PodUnknownError, match="500"):
        await scene.admit()


async def test_a_pod_of_the_same_name_but_another_uid_is_not_meant(scene: Scene) -> None:
    scene.kube.put(a_pod(uid="successor"))
    with pytest.raises(PodUnknownError, match="another one by now: successor"):
        await scene.admit()


async def test_a_namespace_nobody_knows_must_be_waited_for(scene: Scene) -> None:
    scene.kube.put(a_pod(ns="elsewhere", uid="a"))
    with pytest.raises(PodUnknownError, match="namespace elsewhere is not known"):
        await scene.admit(replace(EVENT, namespace="elsewhere"))  # type: ignore[arg-type]


async def test_a_namespace_that_is_none_or_the_hosts_is_refused(
    scene: Scene, tmp_path: Path
) -> None:
    scene.world.add_pod(a_kube_pod())
    scene.agent.learn()
    (tmp_path / "file").touch()
    before = open_descriptors()
    with pytest.raises(NetnsError, match="cannot open namespace /missing"):
        await scene.admit()
    with pytest.raises(NetnsError, match="not a network namespace"):
        await scene.admit(netns=PodNetns.open(tmp_path / "file"))
    with pytest.raises(NetnsError, match="not a network namespace"):
        await scene.admit(replace(EVENT, netns=str(tmp_path / "file")))
    assert open_descriptors() <= before + 1  # a thread's


@pytest.mark.netns
@needs_root
class TestWithANamespace:
    async def test_a_pod_in_the_mesh_is_enrolled(self, scene: Scene) -> None:
        scene.world.add_pod(a_kube_pod(ips=()))
        scene.agent.learn()
        with new_namespace() as space:
            await scene.admit(netns=space.duplicate())
            assert scene.world.served == {A: space.id}

    async def test_the_watch_may_come_a_little_later(self, scene: Scene) -> None:
        async def later() -> None:
            scene.world.add_pod(a_kube_pod(ips=()))
            scene.agent.view.take_pods([Changed(scene.world.pods[A], None)])

        with new_namespace() as space:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scene.admit, EVENT, space.duplicate())
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(later)
        assert A in scene.world.served
        assert scene.kube.requests == []

    async def test_without_a_uid_the_pod_is_fetched_for_the_watch_may_show_its_predecessor(
        self, scene: Scene
    ) -> None:
        scene.world.add_pod(a_kube_pod("old", name="a"))
        scene.agent.learn()
        scene.kube.put(a_pod(uid="a", ip=None))
        fresh = decode_pod(b'{"metadata": {"name": "a", "uid": "a", "namespace": "shop"}}')
        scene.world.pods[A] = replace(fresh, version="1")
        with new_namespace() as space:
            await scene.admit(replace(EVENT, uid=""), space.duplicate())
            assert scene.world.served[A] == space.id

    async def test_a_namespace_without_the_pods_address_is_refused(self, scene: Scene) -> None:
        scene.world.add_pod(a_kube_pod())
        scene.agent.learn()
        ips = a_kube_pod().ips
        with new_namespace() as space, pytest.raises(NetnsError, match="none of the pod's"):
            await scene.admit(replace(EVENT, ips=ips), space.duplicate())
