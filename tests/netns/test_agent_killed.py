"""Our node agent dies at every step of its work, in a real kernel; another one comes after it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import pytest

from cni.agent.app import Agent
from cni.agent.objects import KubePod
from cni.redirect.apply import inspect_redirect, read_stamp
from cni.redirect.branch_eni import PROTOCOL
from cni.redirect.host import read_members
from cni.redirect.plan import RedirectPlan
from tests.support.agent_scene import IPS, Scene, agent_scene, uid_of
from tests.support.kube import eventually
from tests.support.namespaces import needs_root, open_descriptors, output_of
from tests.support.node_world import KilledError
from ztunnel.linux.netns import PodNetns

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240), needs_root]

# What the agent does for one pod, in this order; it dies before each, and after the last.
ENROLS = ["find", "inspect", "apply", "inspect", "add", "silent_ports", "put", "set"]
RELEASES = ["drop", "is_alive", "remove", "remove", "set"]
EARLY_DEMUX = Path("/proc/sys/net/ipv4/tcp_early_demux")
LABEL = "istio.io/dataplane-mode"


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with agent_scene() as scene:
        set_mode(scene, "server", "ambient")
        yield scene


def set_mode(scene: Scene, name: str, mode: str | None) -> None:
    """Take one pod in or out, by its own label."""
    pod = scene.kube.pod(name)
    pod["metadata"]["labels"] = {LABEL: mode} if mode else {}
    scene.kube.put(pod)


class Fate:
    """Lets an agent die at the `at`th thing it does about the client, from 0 on."""

    def __init__(self, scene: Scene, at: int) -> None:
        self.done: list[str] = []
        self.counts = False
        self._at = at
        self._uid = uid_of("client")
        self._netns = scene.pods["client"].netns.id

    def rule(self, agent: Agent) -> None:
        """Take an agent in hand, before it runs."""
        enroller = agent.reconciler._enroller
        for part in ("_kernel", "_spaces", "_proxies", "_probes", "_annotations"):
            setattr(enroller, part, Ruled(self, getattr(enroller, part)))

    def meet(self, name: str, words: tuple[object, ...]) -> None:
        """Die, if it is time; called before each step."""
        if not self.counts or not any(map(self._is_client, words)):
            return
        if len(self.done) == self._at:
            raise KilledError
        self.done.append(name)

    def _is_client(self, word: object) -> bool:
        if isinstance(word, PodNetns):
            return word.id == self._netns
        return self._uid == (word.uid if isinstance(word, KubePod) else word)


class Ruled:
    """Passes calls on."""

    def __init__(self, fate: Fate, real: object) -> None:
        self._fate = fate
        self._real = real

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if not iscoroutinefunction(method):
            return method

        async def call(*words: object) -> object:
            self._fate.meet(name, words)
            return await method(*words)

        return call


async def die_at(scene: Scene, at: int, *, mode: str | None) -> list[str]:
    """Change the client's label while an agent runs that is to die; give what it did until then."""
    fate = Fate(scene, at)
    try:
        async with scene.running_agent(fate.rule) as agent:
            await eventually(lambda: agent.proxies.is_ready)
            await until_settled(agent)
            fate.counts = True
            set_mode(scene, "client", mode)
            await scene.until("client", status="enabled" if mode else None)
            await agent.reconciler.wait_idle()
    except BaseExceptionGroup as group:
        _, rest = group.split(KilledError)
        if rest is not None:
            raise
    return fate.done


async def until_settled(agent: Agent) -> None:
    """Wait until all pods are where they should be, also those that waited for a proxy."""

    def is_settled() -> bool:
        return {pod.state for pod in agent.status().pods} <= {"enrolled", "outside"}

    await eventually(is_settled, 20)
    await agent.reconciler.wait_idle()


async def survives(scene: Scene) -> None:
    """Have another agent put it right, whatever it finds; then the pod is in the mesh."""
    async with scene.running_agent() as agent:
        await scene.until("client", "server")
        await until_settled(agent)
        assert inspect_redirect(scene.pods["client"].netns, RedirectPlan()) == []
        assert uid_of("client") in read_members(scene.node.netns).values()
        assert agent.proxies.is_served(uid_of("client"))
        (await scene.call()).socket.close()


async def is_rid_of_it(scene: Scene) -> None:
    """Have another agent put it right, whatever it finds; then nothing is left."""
    set_mode(scene, "client", None)
    async with scene.running_agent() as agent:
        await scene.until("client", status=None)
        await eventually(lambda: agent.proxies.is_ready)  # it has heard of it, too
        await until_settled(agent)
        assert read_stamp(scene.pods["client"].netns) is None
        assert set(read_members(scene.node.netns).values()) == {uid_of("server")}
        assert list(agent.reconciler.enrolments) == [uid_of("server")]


def held(pid: int) -> int:
    """Count the descriptors of this process and the proxy's."""
    return open_descriptors() + len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
async def test_wherever_an_agent_dies_while_it_takes_a_pod_in_the_next_one_goes_on(
    scene: Scene,
) -> None:
    async with scene.running_proxy() as proxy:
        counts = []
        for at in range(len(ENROLS) + 1):
            done = await die_at(scene, at, mode="ambient")
            assert done == ENROLS[:at], "the list is not what it does: mend it"
            await survives(scene)
            await is_rid_of_it(scene)
            await eventually(lambda: not counts or held(proxy.process.pid) <= counts[0])
            counts.append(held(proxy.process.pid))


@pytest.mark.slow
async def test_wherever_an_agent_dies_while_it_takes_a_pod_out_the_next_one_goes_on(
    scene: Scene,
) -> None:
    async with scene.running_proxy():
        for at in range(len(RELEASES) + 1):
            set_mode(scene, "client", "ambient")
            await survives(scene)
            done = await die_at(scene, at, mode=None)
            assert done == RELEASES[:at], "the list is not what it does: mend it"
            await is_rid_of_it(scene)


async def test_routing_rules_of_a_pod_that_ends_while_no_agent_runs_go_with_the_next_one(
    scene: Scene,
) -> None:
    node = scene.node
    node.netns.call(lambda: EARLY_DEMUX.write_text("0"))
    for table, pod in zip(("101", "102"), scene.pods.values(), strict=True):
        link = f"pod{pod.port}"
        address = f"{pod.addresses[0]}/32"
        output_of(node, "ip", "route", "add", address, "dev", link, "table", table)
        output_of(node, "ip", "rule", "add", "iif", link, "lookup", table, "pref", "10")
    set_mode(scene, "client", "ambient")
    async with scene.running_agent(), scene.running_proxy():
        await scene.until(*IPS)
        assert len(routing_rules(scene)) == 4
    assert len(routing_rules(scene)) == 4
    scene.kube.remove("client")
    scene.cluster.remove_pod(scene.pods.pop("client"))
    foreign = ["to", IPS["client"], "lookup", "102", "pref", "512"]
    output_of(node, "ip", "rule", "add", *foreign)
    async with scene.running_agent():
        ours = routing_rules(scene)
    assert len(ours) == 2
    assert f"to {IPS['server']} " in "".join(ours)
    assert " ".join(["to", IPS["client"], "lookup 102"]) in output_of(node, "ip", "rule")


def routing_rules(scene: Scene) -> list[str]:
    rules = output_of(scene.node, "ip", "rule").splitlines()
    return [rule for rule in rules if rule.endswith(f"proto {PROTOCOL}")]
