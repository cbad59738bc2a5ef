"""Our node agent with our node proxy, real namespaces and a small Kubernetes API.

With ZTUNNEL_REFERENCE, the path of the reference's ztunnel, all of it runs with that one too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from cni.agent.app import Agent
from cni.agent.errors import SocketPathError, UsurpedError
from cni.plugin.errors import PluginError
from cni.redirect.apply import inspect_redirect, read_stamp, remove_redirect
from cni.redirect.host import read_members
from cni.redirect.plan import RedirectPlan
from tests.support import peers
from tests.support.agent_scene import IPS, Scene, agent_scene, uid_of
from tests.support.kube import a_namespace, a_pod, eventually
from tests.support.namespaces import needs_nft, needs_root, open_descriptors, output_of
from tests.support.zds import ScriptedProxy
from ztunnel.model.network import parse_ip

pytestmark = [pytest.mark.netns, needs_root]


@pytest.fixture(
    params=["ours", pytest.param("reference", marks=pytest.mark.reference("ZTUNNEL_REFERENCE"))]
)
def reference(request: pytest.FixtureRequest) -> str | None:
    return os.environ["ZTUNNEL_REFERENCE"] if request.param == "reference" else None


@pytest.fixture
async def scene(reference: str | None) -> AsyncIterator[Scene]:
    async with agent_scene(reference=reference) as scene:
        yield scene


async def test_a_label_takes_running_pods_in_and_out(scene: Scene) -> None:
    async with scene.running_agent(), scene.running_proxy() as proxy:
        async with await scene.call():
            assert proxy.lines.find("connection complete") is None
        scene.kube.label("shop", "ambient")
        await scene.until(*IPS)
        (await scene.call()).socket.close()
        line = await proxy.lines.wait_for("connection complete", 'direction="inbound"')
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
        assert set(read_members(scene.node.netns).values()) == {uid_of(name) for name in IPS}
        seen = len(proxy.lines.all)
        scene.kube.label("shop", None)
        await scene.until(*IPS, status=None)
        assert read_members(scene.node.netns) == {}
        for pod in scene.pods.values():
            assert read_stamp(pod.netns) is None
        (await scene.call()).socket.close()
        assert proxy.lines.find("connection complete", "hello", since=seen) is None


async def test_a_new_pod_is_captured_before_it_starts(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy() as proxy:
        await scene.until(*IPS)
        scene.kube.remove("client")
        scene.cluster.remove_pod(scene.pods["client"])
        scene.proc.end_all()
        scene.announce("client", with_ip=False)
        scene.add_pod("client", runs=False)
        with trio.fail_after(10):
            await scene.plugin("client")
        assert inspect_redirect(scene.pods["client"].netns, RedirectPlan()) == []
        assert scene.kube.status("client") == "enabled"
        (await scene.call()).socket.close()
        await proxy.lines.wait_for("connection complete", 'direction="outbound"')
        assert agent.metrics.plugin_requests.count("200").value == 1


async def test_without_a_proxy_no_pod_starts_and_outside_the_mesh_it_does(scene: Scene) -> None:
    async with scene.running_agent():
        with trio.fail_after(10):
            await scene.plugin("client")
        scene.kube.label("shop", "ambient")
        await scene.until("client", status="pending")
        with pytest.raises(PluginError, match="503"), trio.fail_after(10):
            await scene.plugin("client")


async def test_an_agent_that_restarts_disturbs_no_connection(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_proxy() as proxy:
        async with scene.running_agent():
            await scene.until(*IPS)
            stream = await scene.call()
        before = open_descriptors()
        await stream.send_all(b"alone")
        assert await peers.read_exactly(stream, 5) == b"alone"
        for _ in range(3):
            async with scene.running_agent() as agent:
                await until_served(agent)
                await eventually(lambda: agent.status().ready)
                assert [pod.repairs for pod in agent.status().pods] == [0, 0]
            await stream.send_all(b"still")
            assert await peers.read_exactly(stream, 5) == b"still"
        assert open_descriptors() == before
        assert proxy.process.returncode is None
        await stream.aclose()


async def test_a_proxy_that_restarts_is_given_all_pods_and_meanwhile_nothing_gets_through(
    scene: Scene,
) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent:
        async with scene.running_proxy():
            await scene.until(*IPS)
            (await scene.call()).socket.close()
        patches = len(scene.kube.patches)
        with pytest.raises(OSError, match="refused"):
            await scene.connect()
        async with scene.running_proxy():
            await until_served(agent)
            (await scene.call()).socket.close()
        assert len(scene.kube.patches) == patches


async def until_served(agent: Agent) -> None:
    await eventually(lambda: all(map(agent.proxies.is_served, map(uid_of, IPS))), 20)


async def until_repaired(agent: Agent, count: int) -> None:
    await eventually(lambda: agent.metrics.repairs.value >= count)
    await agent.reconciler.wait_idle()


async def test_rules_that_vanish_come_back(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy():
        await scene.until(*IPS)
        remove_redirect(scene.pods["client"].netns)
        await until_repaired(agent, 1)
        assert inspect_redirect(scene.pods["client"].netns, RedirectPlan()) == []


@needs_nft
async def test_rules_as_ours_stand_whoever_wrote_them_and_the_references_yield(
    scene: Scene,
) -> None:
    scene.kube.label("shop", "ambient")
    client = scene.pods["client"]
    async with scene.running_agent() as agent, scene.running_proxy():
        await scene.until(*IPS)
        # As the reference writes its nftables form: no stamp, everything anew.
        flush = "".join(f"flush table inet {table.name}\n" for table in RedirectPlan().tables)
        ours = str(RedirectPlan())
        output_of(client, "nft", "-f", "-", stdin=flush + ours)
        await trio.sleep(0.7)
        assert agent.metrics.repairs.value == 0
        reference = ours.replace("fib daddr type local ", "")
        assert reference != ours
        output_of(client, "nft", "-f", "-", stdin=flush + reference)
        await until_repaired(agent, 1)
        assert inspect_redirect(client.netns, RedirectPlan()) == []


async def test_a_sandbox_replaced_behind_our_back_is_found_and_captured(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy() as proxy:
        await scene.until(*IPS)
        # As after a reboot of the node: same pod, same address, nobody asked the plugin.
        scene.cluster.remove_pod(scene.pods["client"])
        scene.proc.end_all()
        scene.proc.add(uid_of("server"), scene.pods["server"].netns)
        await scene.until("client", status="pending")
        scene.add_pod("client")
        await scene.until("client")
        assert inspect_redirect(scene.pods["client"].netns, RedirectPlan()) == []
        (await scene.call()).socket.close()
        await proxy.lines.wait_for("connection complete", 'direction="outbound"')
        assert agent.metrics.repairs.value >= 1


async def test_while_kubernetes_is_away_pods_stay_protected_and_changes_follow(
    scene: Scene,
) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy():
        await scene.until(*IPS)
        scene.kube.stop()
        remove_redirect(scene.pods["server"].netns)
        await until_repaired(agent, 1)
        (await scene.call()).socket.close()
        scene.kube.label("shop", None)
        scene.kube.is_down = False
        await scene.until(*IPS, status=None)
        assert read_stamp(scene.pods["client"].netns) is None


async def test_a_proxy_that_never_answers_keeps_pods_pending(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent:
        with ScriptedProxy(str(scene.zds_path)) as proxy:
            proxy.hello()
            await scene.until(*IPS, status="pending")
            await proxy.take()
            with trio.fail_after(15):
                while agent.proxies.connections:
                    await agent.proxies.wait_change()
        assert {pod.state for pod in agent.status().pods} == {"pending"}
        async with scene.running_proxy():
            await scene.until(*IPS)


async def test_a_pod_that_goes_while_it_is_enrolled_leaves_nothing(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy():
        await scene.until(*IPS)
        before = open_descriptors()
        for _ in range(3):
            scene.kube.remove("client")
            scene.cluster.remove_pod(scene.pods["client"])
            scene.proc.end_all()
            scene.proc.add(uid_of("server"), scene.pods["server"].netns)
            scene.add_pod("client")
            scene.announce("client")
            await scene.until("client")
        await agent.reconciler.wait_idle()
        assert open_descriptors() <= before
        assert read_members(scene.node.netns)[parse_ip(IPS["client"])] == uid_of("client")


async def test_of_two_agents_the_first_keeps_the_node(scene: Scene) -> None:
    async with scene.running_agent():
        first = scene.agent
        with pytest.RaisesGroup(SocketPathError, flatten_subgroups=True, allow_unwrapped=True):
            async with scene.running_agent():
                pass
        assert first is not None
        assert first.status().ready


async def test_an_agent_whose_socket_is_taken_steps_back(scene: Scene) -> None:
    with pytest.RaisesGroup(UsurpedError, flatten_subgroups=True):
        async with scene.running_agent():
            # As the reference does: remove whatever is there, then listen.
            scene.zds_path.unlink()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
                other.bind(str(scene.zds_path))
                await trio.sleep(10)
    assert scene.zds_path.is_socket()  # and that stays the other's


async def test_operators_see_what_became_of_each_pod(scene: Scene) -> None:
    scene.kube.put(a_namespace("other"), a_pod("x", "other", uid="x", ip="10.244.1.99"))
    scene.kube.label("shop", "ambient")
    async with scene.running_agent() as agent, scene.running_proxy():
        await scene.until(*IPS)
        await agent.reconciler.wait_idle()
        found = {pod.name: pod.state + pod.reason for pod in agent.status().pods}
        wanted = {"client": "enrolled", "server": "enrolled", "x": "outsideno selector matches"}
        assert found == wanted
        rules = await agent.rules_of("shop/client")
        assert rules is not None
        assert "# the kernel has:" in rules
        assert str(RedirectPlan()) in rules
        assert await agent.rules_of("other/x") is None
