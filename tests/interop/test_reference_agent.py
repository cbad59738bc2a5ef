"""The reference's node agent and plugin with our proxy, and in turns with ours.

Runs when ISTIO_CNI_AGENT is the path of its node agent (`install-cni`), and for the plugin
ISTIO_CNI_PLUGIN that of `istio-cni`; no registry has them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cni.agent.app import Agent
from cni.redirect.apply import inspect_redirect, read_stamp
from cni.redirect.plan import RedirectPlan
from tests.support import peers
from tests.support.agent_scene import IPS, Scene, uid_of
from tests.support.kube import eventually
from tests.support.namespaces import needs_nft, needs_root, output_of
from tests.support.reference_agent import (
    call_plugin,
    reference_scene,
    running_reference_agent,
)

ROOT = Path(__file__).parents[2]
AGENT = pytest.mark.reference("ISTIO_CNI_AGENT")
PLUGIN = pytest.mark.reference("ISTIO_CNI_PLUGIN")
pytestmark = [pytest.mark.netns, pytest.mark.interop, needs_root, needs_nft]
FORMS = {
    "nftables": {},
    "iptables-nft": {"NATIVE_NFTABLES": "false", "FORCE_IPTABLES_BINARY": "nft"},
    "iptables-legacy": {"NATIVE_NFTABLES": "false", "FORCE_IPTABLES_BINARY": "legacy"},
}


@pytest.fixture
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with reference_scene(tmp_path_factory.mktemp("n")) as scene:
        yield scene


def program() -> str:
    return os.environ["ISTIO_CNI_AGENT"]


async def until_settled(agent: Agent) -> None:
    await eventually(lambda: all(map(agent.proxies.is_served, map(uid_of, IPS))), 20)
    await agent.reconciler.wait_idle()


async def still_talks(stream: trio.SocketStream) -> bool:
    await stream.send_all(b"still")
    with trio.fail_after(5):
        return await peers.read_exactly(stream, 5) == b"still"


def redirection(scene: Scene) -> str:
    """What the kernel has of it in a pod, in both forms."""
    client = scene.pods["client"]
    lists = ("nft", "list", "ruleset"), ("iptables-legacy-save",), ("ip", "rule")
    return "\n".join(output_of(client, *words) for words in lists)


@AGENT
async def test_its_agent_has_our_proxy_serve_pods_and_takes_them_back(scene: Scene) -> None:
    async with running_reference_agent(scene, program()), scene.running_proxy() as proxy:
        scene.kube.label("shop", "ambient")
        await scene.until(*IPS)
        (await scene.call()).socket.close()
        line = await proxy.lines.wait_for("connection complete", 'direction="inbound"')
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
        assert common_rules(scene) != []
        scene.kube.label("shop", None)
        await scene.until(*IPS, status=None)
        await proxy.lines.wait_for("pod deleted", uid_of("client"))
        await proxy.lines.wait_for("pod deleted", uid_of("server"))
        seen = len(proxy.lines.all)
        (await scene.call()).socket.close()
        assert proxy.lines.find("connection complete", since=seen) is None


@AGENT
@pytest.mark.parametrize("form", FORMS)
async def test_our_agent_takes_over_from_it_under_a_connection(scene: Scene, form: str) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_proxy() as proxy:
        async with running_reference_agent(scene, program(), **FORMS[form]):
            await scene.until(*IPS)
            stream = await scene.call()
            theirs = common_rules(scene)
        async with stream, scene.running_agent() as agent:
            await until_settled(agent)
            assert await still_talks(stream)
            for pod in scene.pods.values():
                assert inspect_redirect(pod.netns, RedirectPlan()) == []
                assert uid_of(pod.name) in (read_stamp(pod.netns) or "")
            assert "ISTIO_" not in redirection(scene)
            if form == "nftables":
                assert common_rules(scene) == theirs
            seen = len(proxy.lines.all)
            (await scene.call()).socket.close()
            await proxy.lines.wait_for("connection complete", "outbound", since=seen)


@AGENT
async def test_it_takes_over_from_our_agent_under_a_connection(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    async with scene.running_proxy() as proxy:
        async with scene.running_agent() as agent:
            await scene.until(*IPS)
            await until_settled(agent)
            stream = await scene.call()
            before = redirection(scene)
        seen = len(proxy.lines.all)
        async with stream, running_reference_agent(scene, program()):
            await proxy.lines.wait_for("connected to node agent", since=seen, seconds=20)
            assert await still_talks(stream)
            (await scene.call()).socket.close()
            assert without_counters(redirection(scene)) == without_counters(before)
            scene.kube.label("shop", None)
            await scene.until(*IPS, status=None)
            await eventually(lambda: "istio" not in redirection(scene))


def without_counters(text: str) -> list[str]:
    return [re.sub(r"packets \d+ bytes \d+", "", line) for line in text.splitlines()]


def common_rules(scene: Scene) -> list[str]:
    """The rules of a pod in nftables, in any order, without what is only ours (node-agent.md)."""
    return sorted(
        line.replace(" fib daddr type local", "").strip()
        for line in without_counters(output_of(scene.pods["client"], "nft", "list", "ruleset"))
        if "fe80::/10" not in line and "comment" not in line
    )


@PLUGIN
async def test_its_plugin_waits_for_our_agent(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    netns = f"/proc/{os.getpid()}/fd/{scene.pods['client'].netns.fileno()}"
    async with scene.running_agent() as agent:
        await eventually(lambda: agent.status().ready)
        status, answer = await call_plugin(scene, os.environ["ISTIO_CNI_PLUGIN"], netns=netns)
        assert (status, "no node proxy is connected" in answer["msg"]) == (1, True)
        async with scene.running_proxy():
            await scene.until(*IPS)
            status, answer = await call_plugin(scene, os.environ["ISTIO_CNI_PLUGIN"], netns=netns)
        assert (status, answer["ips"][0]["address"]) == (0, f"{IPS['client']}/24")
        assert agent.metrics.plugin_requests.count("503").value == 1
        assert agent.metrics.plugin_requests.count("200").value == 1


@AGENT
async def test_our_plugin_waits_for_its_agent(scene: Scene) -> None:
    scene.kube.label("shop", "ambient")
    process = scene.proc.add(uid_of("client"), scene.pods["client"].netns)
    netns = f"/proc/{process.name}/ns/net"  # under /host, where that agent looks for it
    ours = (sys.executable, "-m", "cni.plugin")
    environment = {"PYTHONPATH": str(ROOT)}
    async with running_reference_agent(scene, program()):
        status, answer = await call_plugin(scene, *ours, netns=netns, environment=environment)
        assert (status, answer["details"]) == (1, "no ztunnel connection")
        async with scene.running_proxy() as proxy:
            await scene.until(*IPS)
            status, answer = await call_plugin(scene, *ours, netns=netns, environment=environment)
            assert (status, answer["ips"][0]["address"]) == (0, f"{IPS['client']}/24")
            (await scene.call()).socket.close()
            await proxy.lines.wait_for("connection complete", 'direction="outbound"')
