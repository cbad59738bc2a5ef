"""What the agent's lines are about can be told from their labels, which are the reference's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.agent import zds_server
from cni.agent.errors import NoProxyError
from cni.agent.http_server import Request
from cni.agent.metrics import AgentMetrics
from cni.agent.plugin_events import PluginDoor, PluginEvent
from cni.agent.probes import ProbeSets
from cni.agent.zds_server import serve_zds
from cni.redirect.errors import RedirectError
from cni.redirect.host import HostPlan
from tests.support.namespaces import needs_root
from tests.support.node_world import A, Agent, World, a_kube_pod
from tests.support.zds import ScriptedProxy
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import parse_ip
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import PIPELINE

POD = {"ns": "shop", "name": "a", "uid": "a"}


class Lines(list[str]):
    """Lines as they are written, in JSON."""

    def of(self, message: str) -> list[dict[str, object]]:
        found = [json.loads(line) for line in self]
        return [line for line in found if line["message"] == message]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    lines, usual, form = Lines(), str(PIPELINE.filter), PIPELINE.json
    monkeypatch.setattr(PIPELINE.writer, "write", lines.append)
    PIPELINE.set_up("info", json=True)
    PIPELINE.cover("cni", Level.DEBUG)
    yield lines
    PIPELINE.set_up(usual, json=form)


def is_about(line: dict[str, object], labels: dict[str, str]) -> bool:
    return labels.items() <= line.items()


async def test_all_lines_about_a_pod_name_it_also_when_it_is_gone(
    lines: Lines, tmp_path: Path
) -> None:
    world = World(tmp_path)
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    world.fail["apply"] = RedirectError("busy")
    await agent.settle()
    del world.fail["apply"]
    for _ in range(2):
        agent.reconciler.mark_all()
        await agent.settle()
        world.rules.clear()
    del world.pods[A]
    agent.learn()
    await agent.settle()
    said = ["look at pod", "pod not converged", "pod enrolled", "pod repaired", "pod released"]
    for message in said:
        found = lines.of(message)
        assert found, message
        assert all(is_about(line, POD) for line in found), found
    agent.reconciler.close()


async def test_the_lines_of_each_proxys_connection_can_be_told_apart(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zds_server, "ACCEPT_SECONDS", 0.001)
    with tempfile.TemporaryDirectory() as folder:  # a short path, for a socket
        path = f"{folder}/zds.sock"
        async with serve_zds(path) as server:
            server.keep(A)
            for number in (1, 2):
                with ScriptedProxy(path) as proxy:
                    await proxy.snapshot()
                    await server.wait_connected()
                while len(lines.of("node proxy lost")) < number:
                    await server.wait_change()
    said = ["node proxy connected", "node proxy said hello", "node proxy lost"]
    names = [[line["conn_uuid"] for line in lines.of(message)] for message in said]
    assert names[0] == names[1] == names[2]
    assert len(set(names[0])) == 2
    answered = lines.of("node proxy answered")
    assert [line["conn_uuid"] for line in answered[::2]] == names[0]
    assert answered[0]["uid"] == A


async def test_an_event_of_the_plugin_is_labelled_and_so_is_its_refusal(lines: Lines) -> None:
    async def admit(event: PluginEvent, netns: PodNetns | None) -> None:
        raise NoProxyError("none")

    body = b'{"Netns": "/n", "PodName": "a", "PodNamespace": "shop", "PodUID": "a"}'
    await PluginDoor(admit, AgentMetrics()).on_event(Request("POST", "/cmdadd", "", body))
    (heard,), (refused,) = lines.of("plugin event"), lines.of("pod not admitted")
    assert is_about(heard, POD | {"cni-event": "add", "netns": "/n", "level": "debug"})
    assert is_about(refused, {"ns": "shop", "name": "a", "cni-event": "add", "level": "warn"})


@pytest.mark.netns
@needs_root
async def test_a_change_of_the_probed_addresses_names_sets_and_pod(lines: Lines) -> None:
    with new_namespace() as host:
        probes = ProbeSets(host, HostPlan(), AgentMetrics())
        await probes.put(A, [parse_ip("10.1.0.1")])
        await probes.drop(A)
    put, drop = lines.of("sets change")
    assert is_about(put, {"podUID": "a", "ipset": "istio-inpod-probes", "put": "10.1.0.1"})
    assert is_about(drop, {"podUID": "a", "removed": "10.1.0.1"})
