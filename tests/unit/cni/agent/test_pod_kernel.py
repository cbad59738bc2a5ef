from __future__ import annotations

import os
from collections.abc import Iterator, Set as AbstractSet
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from cni.agent.pod_kernel import KernelThreads, NetnsFinder
from cni.agent.pod_netns import NodeView
from cni.agent.runtime_client import RuntimeClient
from cni.redirect.plan import RedirectPlan
from tests.support.kube import FakeProc
from tests.support.namespaces import listen, needs_root, open_descriptors
from ztunnel.devmesh.cluster import Cluster, Node, Pod
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import parse_ip
from ztunnel.model.workload import PodUid

pytestmark = [pytest.mark.netns, needs_root]

PLAN = RedirectPlan()
NOBODY = RuntimeClient(())  # to ask
IP = parse_ip("10.1.0.1")
UIDS = [PodUid(f"{number}1111111-2222-3333-4444-555555555555") for number in range(5)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def node(cluster: Cluster) -> Node:
    return cluster.add_node("node")


@pytest.fixture
def pod(cluster: Cluster, node: Node) -> Pod:
    return cluster.add_pod(node, "pod", str(IP))


async def test_rules_are_written_read_and_taken_away(pod: Pod) -> None:
    kernel = KernelThreads()
    assert await kernel.inspect(pod.netns, PLAN)
    assert await kernel.stamp(pod.netns) is None
    await kernel.apply(pod.netns, PLAN, "a stamp")
    assert await kernel.inspect(pod.netns, PLAN) == []
    assert await kernel.stamp(pod.netns) == "a stamp"
    await kernel.remove(pod.netns)
    assert await kernel.stamp(pod.netns) is None


async def test_a_namespace_closed_meanwhile_does_no_harm(pod: Pod) -> None:
    kernel = KernelThreads()
    before = open_descriptors()
    held = pod.netns.duplicate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.inspect, held, PLAN)
        await trio.testing.wait_all_tasks_blocked()
        held.close()
    assert open_descriptors() == before


async def test_who_listens_is_asked_of_the_kernel(pod: Pod) -> None:
    kernel = KernelThreads()
    assert await kernel.silent_ports(pod.netns) == [15001, 15006, 15008]
    with listen(pod.netns, 15006):
        assert await kernel.silent_ports(pod.netns) == [15001, 15008]


class CountingView(NodeView):
    """Counts how often all processes are looked through."""

    searches = 0

    def find(self, wanted: object) -> dict[PodUid, PodNetns]:
        type(self).searches += 1
        return super().find(wanted)  # type: ignore[arg-type]


async def test_searches_at_the_same_time_share_one(node: Node, pod: Pod, tmp_path: Path) -> None:
    proc = FakeProc(tmp_path)
    for uid in UIDS:
        proc.add(uid, pod.netns)
    finder = NetnsFinder(CountingView(tmp_path, (), node.netns.id), NOBODY)
    await finder.find(UIDS[0], [])
    CountingView.searches = 0
    before = open_descriptors()
    found = []

    async def find(uid: PodUid) -> None:
        netns = await finder.find(uid, [IP])
        assert netns is not None
        found.append(netns)

    async with trio.open_nursery() as nursery:
        for uid in UIDS:
            nursery.start_soon(find, uid)
    assert CountingView.searches <= 2
    assert {netns.id for netns in found} == {pod.netns.id}
    for netns in found:
        netns.close()
    assert open_descriptors() == before


async def test_a_sandbox_is_alive_while_it_has_an_address(
    cluster: Cluster, node: Node, pod: Pod, tmp_path: Path
) -> None:
    finder = NetnsFinder(NodeView(tmp_path, (), node.netns.id), NOBODY)
    assert await finder.is_alive(pod.netns)
    with pod.netns.duplicate() as held:
        cluster.remove_pod(pod)
        assert not await finder.is_alive(held)
        assert await finder.find(UIDS[0], [IP]) is None


class TellingRuntime(RuntimeClient):
    """Says this of the pods it is asked for."""

    def __init__(self, paths: dict[PodUid, str]) -> None:
        super().__init__(())
        self.paths = paths

    async def paths_of(self, uids: AbstractSet[PodUid]) -> tuple[dict[PodUid, str], list[str]]:
        await trio.lowlevel.checkpoint()
        return {uid: path for uid, path in self.paths.items() if uid in uids}, []


async def test_pods_are_found_by_the_runtime_or_else_by_their_processes(
    node: Node, pod: Pod, cluster: Cluster, tmp_path: Path
) -> None:
    other = cluster.add_pod(node, "other", "10.1.0.2")
    proc = FakeProc(tmp_path)
    proc.add(UIDS[1], other.netns)
    before = open_descriptors()
    # Of the second pod the runtime says what cannot be true: it is the first one's namespace.
    path = f"/proc/{os.getpid()}/fd/{pod.netns.fileno()}"
    runtime = TellingRuntime({UIDS[0]: path, UIDS[1]: path, UIDS[2]: "/nowhere"})
    finder = NetnsFinder(NodeView(tmp_path, (Path("/"),), node.netns.id), runtime)
    wanted = {UIDS[0]: (IP,), UIDS[1]: other.addresses, UIDS[2]: (IP,)}
    with structlog.testing.capture_logs() as lines:
        found = await finder.find_all(wanted)
        again = await finder.find_all(wanted)  # which it does not complain of a second time
    assert {uid: netns.id for uid, netns in found.items()} == {
        UIDS[0]: pod.netns.id,
        UIDS[1]: other.netns.id,
    }
    (line,) = lines
    assert f"none of the addresses of pod {UIDS[1]}" in line["error"]
    assert "cannot open namespace /nowhere" in line["error"]
    for netns in (*found.values(), *again.values()):
        netns.close()
    assert open_descriptors() == before


async def test_what_the_runtime_led_to_is_closed_if_nobody_waits_any_more(
    node: Node, pod: Pod, tmp_path: Path
) -> None:
    path = f"/proc/{os.getpid()}/fd/{pod.netns.fileno()}"
    finder = NetnsFinder(
        NodeView(tmp_path, (Path("/"),), node.netns.id), TellingRuntime({UIDS[0]: path})
    )
    before = open_descriptors()
    with trio.CancelScope() as scope:
        finder.node = LeavingView(tmp_path, (Path("/"),), node.netns.id)
        LeavingView.scope = scope
        await finder.find_all({UIDS[0]: (IP,), UIDS[1]: (IP,)})
    assert scope.cancelled_caught
    assert open_descriptors() == before


class LeavingView(NodeView):
    """Whoever asks it leaves before the answer is there."""

    scope: trio.CancelScope

    def open_sandboxes(
        self, paths: object, wanted: object
    ) -> tuple[dict[PodUid, PodNetns], list[str]]:
        trio.from_thread.run_sync(self.scope.cancel)
        return super().open_sandboxes(paths, wanted)  # type: ignore[arg-type]
