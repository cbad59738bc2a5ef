from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from cni.agent.app import Agent
from cni.agent.config import AgentConfig
from cni.agent.errors import SocketPathError
from cni.agent.overrides import ProbeStrategy, Redirecting
from cni.agent.pod_netns import NodeView
from cni.redirect.apply import apply_redirect, read_stamp
from cni.redirect.errors import RedirectError
from cni.redirect.host import HostPlan, change_members, inspect_host, read_members
from cni.redirect.plan import RedirectPlan
from tests.support.kube import FakeKube, FakeProc, a_pod, eventually, running
from tests.support.namespaces import listen, needs_root
from tests.support.zds import ScriptedProxy
from ztunnel.devmesh.cluster import Cluster, Pod
from ztunnel.model.network import parse_ip
from ztunnel.wire.zds import Add, Keep

pytestmark = [pytest.mark.netns, needs_root]

UID = "11111111-2222-3333-4444-555555555555"
ENABLED = {"ambient.istio.io/redirection": "enabled"}


class Scene:
    """A node with one pod."""

    def __init__(self, folder: Path, cluster: Cluster, kube: FakeKube) -> None:
        self.folder = folder
        self.kube = kube
        self.node = cluster.add_node("node")
        self.pod: Pod = cluster.add_pod(self.node, "pod", "10.1.0.1")
        self.proc = FakeProc(folder / "proc")
        self.proc.root.mkdir()
        assert kube.server is not None
        self.config = AgentConfig(
            node_name="node",
            api=kube.server,
            run_dir=folder / "run",
            zds_path=folder / "z.sock",
            probe_owner=None,
            health_port=0,
            monitoring_port=0,
            reconcile_seconds=1,
        )

    def agent(self) -> Agent:
        view = NodeView(self.proc.root, (Path("/"),), self.node.netns.id)
        return Agent(self.config, host=self.node.netns, node=view, rng=random.Random(1))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Agent]:
        agent = self.agent()
        async with trio.open_nursery() as nursery:
            with trio.fail_after(10):
                await nursery.start(agent.run)
            yield agent
            nursery.cancel_scope.cancel()


@pytest.fixture
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    with Cluster() as cluster:
        async with running(FakeKube()) as kube:
            kube.label("shop", "ambient")
            yield Scene(tmp_path_factory.mktemp("a"), cluster, kube)


async def until_ready(agent: Agent) -> None:
    await eventually(lambda: agent.status().ready)


async def test_it_waits_for_kubernetes_and_says_so(scene: Scene) -> None:
    scene.kube.is_down = True
    agent = scene.agent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await trio.sleep(0.1)
        status = agent.status()
        assert (status.ready, status.api_silent_seconds) == (False, None)
        assert "Kubernetes" in status.waiting_for
        assert not scene.config.zds_path.exists()
        scene.kube.is_down = False
        await until_ready(agent)
        assert scene.config.zds_path.exists()
        nursery.cancel_scope.cancel()


async def test_the_hosts_probe_rule_stands_before_the_sockets_do(scene: Scene) -> None:
    async with scene.running():
        assert inspect_host(scene.node.netns, HostPlan(owner=None)) == []
    # Nobody takes it away when an agent stops: the next one goes on.
    assert inspect_host(scene.node.netns, HostPlan(owner=None)) == []


async def test_who_may_probe_follows_the_kubelet(scene: Scene) -> None:
    scene.config = replace(scene.config, probe_owner="kubelet")

    def may_probe(uid: int) -> bool:
        return inspect_host(scene.node.netns, HostPlan(owner=uid)) == []

    async with scene.running():
        assert may_probe(0)  # until it is there
        for uid in (1234, 4321):
            kubelet = scene.proc.add_raw("0::/kubelet", scene.node.netns.fileno(), name="kubelet")
            os.chown(kubelet, uid, -1)
            await eventually(lambda: may_probe(uid))  # noqa: B023 - within the turn
            shutil.rmtree(kubelet)
        await trio.sleep(2 * scene.config.reconcile_seconds)
        assert may_probe(4321)


async def test_with_another_strategy_the_host_is_left_alone(scene: Scene) -> None:
    redirecting = Redirecting(probes=ProbeStrategy.NODE_ADDRESS)
    scene.config = replace(scene.config, redirecting=redirecting)
    async with scene.running() as agent:
        await until_ready(agent)
        with pytest.raises(RedirectError):
            read_members(scene.node.netns)


async def test_pods_enrolled_before_are_in_the_first_snapshot(scene: Scene) -> None:
    scene.kube.put(
        a_pod(uid=UID, annotations=ENABLED),
        a_pod("lost", uid="lost", ip="10.1.0.9", annotations=ENABLED),
        a_pod("over", uid="over", phase="Succeeded", annotations=ENABLED),
        a_pod("new", uid="new", ip=None),
    )
    scene.proc.add(UID, scene.pod.netns)
    async with scene.running():
        with ScriptedProxy(str(scene.config.zds_path)) as proxy:
            requests = await proxy.snapshot()
            assert {type(request): request.uid for request in requests} == {
                Add: UID,
                Keep: "lost",
            }  # type: ignore[union-attr]
            assert proxy.namespaces == {UID: scene.pod.netns.id}


async def test_what_an_earlier_agent_exempted_stays_so_without_a_proxy(scene: Scene) -> None:
    scene.kube.put(a_pod(uid=UID, ip="10.1.0.1", annotations=ENABLED))
    scene.proc.add(UID, scene.pod.netns)
    async with scene.running():
        assert read_members(scene.node.netns) == {parse_ip("10.1.0.1"): UID}
    change_members(scene.node.netns, {parse_ip("10.1.0.7"): "gone"}, [])
    async with scene.running() as agent:
        await until_ready(agent)
        assert read_members(scene.node.netns) == {parse_ip("10.1.0.1"): UID}


async def test_rules_an_agent_left_in_a_pod_nobody_wants_are_taken_away(scene: Scene) -> None:
    scene.kube.label("shop", None)
    scene.kube.put(a_pod(uid=UID))
    scene.proc.add(UID, scene.pod.netns)
    apply_redirect(scene.pod.netns, RedirectPlan(), "a stamp")
    async with scene.running() as agent:
        await until_ready(agent)
        assert read_stamp(scene.pod.netns) is None
        assert agent.reconciler.enrolments == {}


async def test_ready_may_need_a_proxy(scene: Scene) -> None:
    scene.config = replace(scene.config, ready_needs_proxy=True)
    async with scene.running() as agent:
        await eventually(lambda: not agent.waiting_for)
        assert agent.status().waiting_for == ["a node proxy"]
        with ScriptedProxy(str(scene.config.zds_path)) as proxy:
            await proxy.snapshot()
            assert agent.status().ready


async def test_a_proxy_that_comes_is_given_what_waits_for_it(scene: Scene) -> None:
    scene.kube.put(a_pod(uid=UID))
    scene.proc.add(UID, scene.pod.netns)
    async with scene.running() as agent, trio.open_nursery() as nursery:
        await until_ready(agent)
        listeners = [listen(scene.pod.netns, port) for port in (15001, 15006, 15008)]
        with ScriptedProxy(str(scene.config.zds_path)) as proxy:
            await proxy.snapshot()
            await scene.kube.until(lambda: scene.kube.status() == "enabled")
        for listener in listeners:
            listener.close()
        nursery.cancel_scope.cancel()


async def test_a_taken_port_stops_the_start(scene: Scene) -> None:
    async with scene.running() as agent:
        assert agent.status().node == "node"
        with pytest.RaisesGroup(SocketPathError, flatten_subgroups=True, allow_unwrapped=True):
            async with scene.running():
                pass


async def test_rules_are_shown_for_pods_of_ours_only(scene: Scene) -> None:
    scene.kube.put(a_pod(uid=UID), a_pod("b", uid="b", ip="10.1.0.9"))
    scene.proc.add(UID, scene.pod.netns)
    async with scene.running() as agent:
        await until_ready(agent)
        assert "# the kernel has:" in (await agent.rules_of("shop/a") or "")
        assert "namespace is not known" in (await agent.rules_of("shop/b") or "")
        assert await agent.rules_of("shop/c") is None
        assert await agent.rules_of("") is None
