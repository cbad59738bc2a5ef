from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import trio

from cni.agent.metrics import AgentMetrics
from cni.agent.probes import ProbeSets
from cni.redirect.branch_eni import Detours
from cni.redirect.errors import RedirectError
from cni.redirect.host import HostPlan, inspect_host, read_members, remove_host
from tests.support.namespaces import needs_root
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress, parse_ip
from ztunnel.model.workload import PodUid

pytestmark = [pytest.mark.netns, needs_root]

A, B = PodUid("a"), PodUid("b")
IP4, IP6, OTHER = parse_ip("10.1.0.1"), parse_ip("fd00::1"), parse_ip("10.1.0.2")


@pytest.fixture
def host() -> Iterator[PodNetns]:
    with new_namespace() as space:
        yield space


@pytest.fixture
def probes(host: PodNetns) -> ProbeSets:
    return ProbeSets(host, HostPlan(), AgentMetrics())


class RecordedDetours(Detours):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.ips: set[IpAddress] = set()

    def put(self, ips: Iterable[IpAddress]) -> None:
        self.ips |= set(ips)

    def drop(self, ips: Iterable[IpAddress]) -> None:
        self.ips -= set(ips)

    def settle(self, ips: Iterable[IpAddress]) -> list[str]:
        self.ips = set(ips)
        return []

    def clear(self) -> None:
        self.ips.clear()


@pytest.mark.parametrize("plan", [HostPlan(), None], ids=["with sets", "with another strategy"])
async def test_detours_come_and_go_with_addresses(host: PodNetns, plan: HostPlan | None) -> None:
    detours = RecordedDetours()
    probes = ProbeSets(host, plan, AgentMetrics(), detours=detours)
    await probes.ensure()
    await probes.put(A, [IP4, IP6])
    await probes.put(A, [OTHER, IP6])
    assert detours.ips == {OTHER, IP6}
    await probes.put(B, [IP4])
    await probes.drop(A)
    assert detours.ips == {IP4}
    detours.ips.clear()
    await probes.ensure()
    assert detours.ips == {IP4}
    await probes.remove()
    assert detours.ips == set()


async def test_at_the_end_one_that_cannot_be_removed_does_not_keep_the_other(
    host: PodNetns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RedirectError("not now")

    detours = RecordedDetours()
    monkeypatch.setattr(detours, "clear", refuse)
    probes = ProbeSets(host, HostPlan(), AgentMetrics(), detours=detours)
    await probes.ensure()
    with pytest.raises(RedirectError, match="not now"):
        await probes.remove()
    with pytest.raises(RedirectError):
        read_members(host)


async def test_addresses_come_and_go_with_their_pods(host: PodNetns, probes: ProbeSets) -> None:
    await probes.ensure()
    await probes.put(A, [IP4, IP6])
    assert read_members(host) == {IP4: "a", IP6: "a"}
    await probes.put(A, [OTHER, IP6])
    assert read_members(host) == {OTHER: "a", IP6: "a"}
    await probes.drop(A)
    await probes.drop(A)
    assert read_members(host) == {}


async def test_an_address_that_changed_hands_stays_with_the_newer_pod(
    host: PodNetns, probes: ProbeSets
) -> None:
    await probes.ensure()
    await probes.put(A, [IP4])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probes.put, B, [IP4])
        await trio.lowlevel.checkpoint()
        nursery.start_soon(probes.drop, A)
    assert read_members(host) == {IP4: "b"}


async def test_what_others_changed_is_repaired(host: PodNetns, probes: ProbeSets) -> None:
    await probes.ensure()
    await probes.put(A, [IP4])
    remove_host(host)
    await probes.put(B, [OTHER])
    await probes.ensure()
    assert read_members(host) == {IP4: "a", OTHER: "b"}
    assert inspect_host(host, HostPlan()) == []


async def test_what_an_earlier_agent_left_is_compared_and_not_emptied_first(
    host: PodNetns, probes: ProbeSets
) -> None:
    await probes.ensure()
    await probes.put(A, [IP4])
    await probes.put(B, [OTHER])
    successor = ProbeSets(host, HostPlan(owner=None), AgentMetrics())
    await successor.put(A, [IP4])
    assert OTHER in read_members(host)
    await successor.ensure()
    assert read_members(host) == {IP4: "a"}
    assert inspect_host(host, HostPlan(owner=None)) == []
    await successor.remove()
    with pytest.raises(RedirectError):
        read_members(host)


async def test_another_strategy_writes_nothing(host: PodNetns) -> None:
    probes = ProbeSets(host, None, AgentMetrics())
    await probes.ensure()
    await probes.put(A, [IP4])
    await probes.drop(A)
    with pytest.raises(RedirectError):
        read_members(host)


async def test_their_number_is_a_metric(host: PodNetns) -> None:
    metrics = AgentMetrics()
    probes = ProbeSets(host, HostPlan(), metrics)
    await probes.put(A, [IP4, IP6])
    assert metrics.exempted.value == 2
