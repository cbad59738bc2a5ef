from __future__ import annotations

from pathlib import Path

from cni.agent.status import AgentStatus, PodStatus, StatusReader, show
from cni.redirect.errors import RedirectError
from tests.support.node_world import A, Agent, World, a_kube_pod


def reader(agent: Agent) -> StatusReader:
    return StatusReader(agent.view, agent.reconciler)


async def test_each_pod_has_its_state_and_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add_pod(a_kube_pod())
    world.add_pod(a_kube_pod("b", host_network=True), runs=False)
    agent = Agent(world)
    before = {pod.name: (pod.state, pod.reason) for pod in reader(agent).pods()}
    assert before == {
        "a": ("waiting", "not looked at yet"),
        "b": ("outside", "uses the host's network"),
    }
    world.has_proxy = False
    await agent.settle()
    (status, _) = reader(agent).pods()
    assert (status.state, status.reason) == ("pending", "no node proxy is connected")
    assert (status.annotation, status.ips) == ("pending", ["10.1.0.1"])
    assert status.netns == world.space(A).inode
    agent.reconciler.close()


async def test_a_pod_that_is_gone_is_shown_while_something_of_it_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    del world.pods[A]
    world.fail["drop"] = RedirectError("busy")
    agent.learn()
    await agent.settle()
    (status,) = reader(agent).pods()
    assert (status.uid, status.state, status.reason) == ("a", "leaving", "busy")
    assert (status.namespace, status.name) == ("shop", "a")
    agent.reconciler.close()


async def test_a_pod_that_a_bug_of_ours_keeps_out_says_so_until_it_is_in(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    world.fail["apply"] = ValueError("a bug")  # type: ignore[assignment]  # no error of ours
    await agent.settle()
    (status,) = reader(agent).pods()
    assert (status.state, status.reason) == ("waiting", "internal error, see the log: a bug")
    del world.fail["apply"]
    agent.reconciler.mark_all()
    await agent.settle()
    (status,) = reader(agent).pods()
    assert (status.state, status.reason) == ("enrolled", "")
    agent.reconciler.close()


def test_people_get_a_table() -> None:
    enrolled = PodStatus(
        namespace="shop",
        name="a",
        uid="u",
        state="enrolled",
        annotation="enabled",
        ips=["10.1.0.1"],
    )
    leaving = PodStatus(namespace="", name="", uid="v", state="leaving", reason="busy", repairs=2)
    status = AgentStatus(
        node="n",
        ready=False,
        waiting_for=["Kubernetes"],
        proxies=1,
        api_silent_seconds=None,
        pods=[enrolled, leaving],
    )
    assert show(status).splitlines() == [
        "node n: not ready, waiting for Kubernetes",
        "node proxies connected: 1; Kubernetes API silent for: never heard",
        "",
        "POD     STATE     ANNOTATION  IPS       REPAIRS  REASON",
        "shop/a  enrolled  enabled     10.1.0.1  0",
        "v       leaving   -           -         2        busy",
    ]
    calm = AgentStatus(
        node="n", ready=True, waiting_for=[], proxies=0, api_silent_seconds=4.4, pods=[]
    )
    assert show(calm).startswith(
        "node n: ready\nnode proxies connected: 0; Kubernetes API silent for: 4 s\n"
    )
