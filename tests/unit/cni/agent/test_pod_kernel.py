from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cni.agent.pod_kernel import KernelThreads, NetnsFinder
from cni.agent.pod_netns import NodeView
from cni.redirect.plan import RedirectPlan
from tests.support.kube import FakeProc
from tests.support.namespaces import listen, needs_root, open_descriptors
from ztunnel.devmesh.cluster import Cluster, Node, Pod
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import parse_ip
from ztunnel.model.workload import PodUid

pytestmark = [pytest.mark.netns, needs_root]

PLAN = RedirectPlan()
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
    finder = NetnsFinder(CountingView(tmp_path, (), node.netns.id))
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
    finder = NetnsFinder(NodeView(tmp_path, (), node.netns.id))
    assert await finder.is_alive(pod.netns)
    with pod.netns.duplicate() as held:
        cluster.remove_pod(pod)
        assert not await finder.is_alive(held)
        assert await finder.find(UIDS[0], [IP]) is None
