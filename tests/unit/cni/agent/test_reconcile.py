from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from cni.agent.enrol import State
from cni.agent.errors import AgentError, NoProxyError, PodUnknownError
from cni.agent.objects import STATUS_ANNOTATION
from cni.agent.reconcile import Offer
from cni.redirect.errors import RedirectError
from cni.redirect.plan import RedirectPlan
from tests.support.namespaces import open_descriptors
from tests.support.node_world import A, Agent, KilledError, World, a_kube_pod
from ztunnel.model.network import parse_ip
from ztunnel.model.workload import PodUid

B = PodUid("b")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    before = open_descriptors()
    yield World(tmp_path)
    assert open_descriptors() == before


async def settle(world: World) -> None:
    """Run an agent until there is nothing to do."""
    agent = Agent(world)
    try:
        await agent.start()
        await agent.settle()
    finally:
        agent.reconciler.close()


async def test_pods_are_enrolled_side_by_side(world: World) -> None:
    world.add_pod(a_kube_pod())
    world.add_pod(a_kube_pod("b", ips=(parse_ip("10.1.0.2"),)))
    await settle(world)
    assert world.is_enrolled(A)
    assert world.is_enrolled(B)


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(a_kube_pod(labels={"istio.io/dataplane-mode": "none"}), id="opted out"),
        pytest.param(a_kube_pod(host_network=True), id="host network"),
        pytest.param(a_kube_pod(is_over=True), id="over"),
    ],
)
async def test_pods_outside_the_mesh_are_left_alone(world: World, pod: object) -> None:
    world.add_pod(pod)  # type: ignore[arg-type]
    await settle(world)
    assert world.is_untouched()
    assert not {"apply", "ack", "put"} & set(world.calls)


async def test_the_namespaces_label_takes_pods_in_and_out(world: World) -> None:
    world.add_pod(a_kube_pod())
    world.mesh = False
    agent = Agent(world)
    await agent.settle()
    assert world.is_untouched()
    for mesh in (True, False, True):
        world.mesh = mesh
        agent.learn()
        await agent.settle()
        assert world.is_enrolled() if mesh else world.is_untouched()
    agent.reconciler.close()


async def test_all_pods_can_be_taken_out_for_good(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.start()
    await agent.settle()
    assert world.is_enrolled()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.reconciler.run)
        await agent.reconciler.release_all()
        assert world.is_untouched()
        world.pods[A] = replace(world.pods[A], labels={"x": "y"})
        agent.learn()
        await agent.reconciler.wait_idle()
        nursery.cancel_scope.cancel()
    assert world.is_untouched()


async def test_a_changed_annotation_changes_the_rules_at_once(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    known = world.pods[A]
    annotations = {**known.annotations, "ambient.istio.io/dns-capture": "true"}
    world.pods[A] = replace(known, annotations=annotations, version="77")
    agent.learn()
    await agent.settle()
    assert world.is_enrolled(plan=RedirectPlan(dns=True))
    agent.reconciler.close()


async def test_a_deleted_pod_is_served_no_more(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    del world.pods[A]
    agent.learn()
    await agent.settle()
    assert (world.served, world.exempted, agent.reconciler.enrolments) == ({}, {}, {})


async def test_a_pod_that_has_run_to_its_end_is_served_no_more(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    world.pods[A] = replace(world.pods[A], is_over=True, ips=(), version="77")
    agent.learn()
    await agent.settle()
    assert (world.served, world.exempted, world.status()) == ({}, {}, None)


async def test_an_address_that_is_reused_at_once_stays_exempt(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    del world.pods[A]
    world.add_pod(a_kube_pod("b"))
    agent.learn()
    await agent.settle()
    assert world.is_enrolled(B)
    assert set(world.exempted.values()) == {B}
    agent.reconciler.close()


async def test_a_pod_without_an_address_waits_for_the_plugin(world: World) -> None:
    world.add_pod(a_kube_pod(ips=()))
    agent = Agent(world)
    await agent.settle()
    assert agent.reconciler.enrolments[A].reason == "not started yet"
    assert "find" not in world.calls


async def offer(world: World, agent: Agent, pod: object = None) -> None:
    """Do what the plugin's event leads to."""
    chosen = pod or world.pods[A]
    netns = world.new_space(chosen.uid)  # type: ignore[attr-defined]
    sandbox = Offer(chosen, netns, (parse_ip("10.1.0.1"),))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.reconciler.run)
        try:
            await agent.reconciler.admit(sandbox)
        finally:
            nursery.cancel_scope.cancel()


async def test_a_new_sandbox_is_enrolled_before_the_pod_starts(world: World) -> None:
    world.add_pod(a_kube_pod(ips=()), runs=False)
    agent = Agent(world)
    await offer(world, agent)
    assert agent.reconciler.enrolments[A].state is State.ENROLLED
    assert world.served == {A: world.space(A)}
    assert world.exempted == {parse_ip("10.1.0.1"): A}
    agent.reconciler.close()


async def test_a_sandbox_of_a_pod_the_watch_has_not_shown_yet_stays_enrolled(world: World) -> None:
    pod = a_kube_pod()
    agent = Agent(world)
    world.pods[A] = pod
    await offer(world, agent, pod)
    agent.reconciler.mark_all()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.reconciler.run)
        await agent.reconciler.wait_idle()
        nursery.cancel_scope.cancel()
    assert A in world.served
    agent.reconciler.close()


async def test_a_newer_sandbox_replaces_the_older(world: World) -> None:
    world.add_pod(a_kube_pod(ips=()), runs=False)
    agent = Agent(world)
    await offer(world, agent)
    await offer(world, agent)
    assert world.served == {A: world.space(A)}
    agent.reconciler.close()


async def test_a_refused_sandbox_is_withdrawn_and_its_reason_told(world: World) -> None:
    world.add_pod(a_kube_pod(ips=()), runs=False)
    world.has_proxy = False
    agent = Agent(world)
    with pytest.RaisesGroup(NoProxyError):
        await offer(world, agent)
    assert agent.reconciler.enrolments[A].netns is None
    assert world.status() == "pending"
    world.has_proxy = True
    await offer(world, agent)
    agent.learn()
    assert world.status() == "enabled"
    agent.reconciler.close()


async def test_a_sandbox_in_an_unknown_namespace_must_wait(world: World) -> None:
    pod = world.add_pod(replace(a_kube_pod(), namespace="elsewhere"), runs=False)  # type: ignore[arg-type]
    with pytest.RaisesGroup(PodUnknownError):
        await offer(world, Agent(world), pod)


async def test_a_sandbox_nobody_waits_for_any_more_is_let_go(world: World) -> None:
    world.add_pod(a_kube_pod(), runs=False)
    agent = Agent(world)
    sandbox = Offer(world.pods[A], world.new_space(A), ())
    with trio.move_on_after(0):
        await agent.reconciler.admit(sandbox)
    assert sandbox.netns is None


async def test_an_agent_that_stops_answers_who_waits(world: World) -> None:
    world.add_pod(a_kube_pod(), runs=False)
    agent = Agent(world)
    sandbox = Offer(world.pods[A], world.new_space(A), ())

    async def wait() -> None:
        with pytest.raises(AgentError, match="stops"):
            await agent.reconciler.admit(sandbox)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await agent.reconciler.run()
    agent.reconciler.close()


async def test_a_failure_is_tried_again_later(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    world.add_pod(a_kube_pod())
    world.fail["apply"] = RedirectError("busy")
    agent = Agent(world)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.reconciler.run)
        await trio.sleep(100)
        tries = world.calls.count("apply")
        assert 5 < tries < 30  # 0.2 s, doubled each time, at most 30 s
        world.fail.clear()
        await trio.sleep(31)
        assert world.status() == "enabled"
        nursery.cancel_scope.cancel()
    agent.reconciler.close()


async def test_a_bug_with_one_pod_does_not_stop_the_others(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    world.add_pod(a_kube_pod())
    world.add_pod(a_kube_pod("b", ips=(parse_ip("10.1.0.2"),)))
    original = world.put

    async def put(uid: PodUid, ips: object) -> None:
        assert uid != A, "a bug"
        await original(uid, ips)  # type: ignore[arg-type]

    world.put = put  # type: ignore[assignment,method-assign]
    agent = Agent(world)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.reconciler.run)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert world.is_enrolled(B)
    assert world.status(A) is None
    agent.reconciler.close()


def kill_points(scenario: str) -> list[object]:
    """The numbers of calls that a scenario makes, each before and after what it does."""
    count = {"enrol": 14, "release": 10}[scenario]
    return [
        pytest.param(number, after, id=f"{number} {'after' if after else 'before'}")
        for number in range(1, count + 1)
        for after in (False, True)
    ]


async def run_until_killed(world: World) -> bool:
    """Run an agent; whether it was killed."""
    try:
        await settle(world)
    except KilledError:
        return True
    except BaseExceptionGroup as group:
        killed, rest = group.split(KilledError)
        if rest is not None:
            raise
        return killed is not None
    return False


@pytest.mark.parametrize(("number", "after"), kill_points("enrol"))
async def test_killed_while_enrolling_the_next_agent_completes_it(
    world: World, number: int, after: bool
) -> None:
    world.add_pod(a_kube_pod())
    world.kill_at, world.kill_after = number, after
    await run_until_killed(world)
    # At no point peers are told to use a tunnel that is not there.
    assert world.status() != "enabled" or world.is_enrolled()
    world.kill_at = None
    await settle(world)
    assert world.is_enrolled()


@pytest.mark.parametrize(("number", "after"), kill_points("release"))
async def test_killed_while_releasing_the_next_agent_completes_it(
    world: World, number: int, after: bool
) -> None:
    world.add_pod(a_kube_pod())
    await settle(world)
    world.mesh = False
    world.calls.clear()
    world.kill_at, world.kill_after = number, after
    await run_until_killed(world)
    world.kill_at = None
    await settle(world)
    assert world.is_untouched()


@pytest.mark.parametrize(("number", "after"), kill_points("enrol"))
async def test_killed_while_enrolling_and_unlabelled_meanwhile_nothing_is_left(
    world: World, number: int, after: bool
) -> None:
    world.add_pod(a_kube_pod())
    world.kill_at, world.kill_after = number, after
    await run_until_killed(world)
    world.kill_at, world.mesh = None, False
    # A proxy drops what the next agent's snapshot lacks: whatever is not announced.
    if world.status() is None:
        world.served.clear()
        world.exempted.clear()  # compared and repaired as a whole, `cni.agent.probes`
    await settle(world)
    assert world.is_untouched()


@pytest.mark.parametrize("scenario", ["enrol", "release"])
async def test_the_points_at_which_we_kill_are_all_there_are(world: World, scenario: str) -> None:
    world.add_pod(a_kube_pod())
    if scenario == "release":
        await settle(world)
        world.mesh = False
        world.calls.clear()
    world.kill_at = len(kill_points(scenario)) // 2 + 1
    assert not await run_until_killed(world)


async def test_events_of_pods_are_counted(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    world.pods[A] = replace(world.pods[A], version="2")
    agent.learn()
    del world.pods[A]
    agent.learn()
    for kind in ("add", "update", "delete"):
        assert agent.metrics.events.count(kind).value == 1


async def test_the_gauges_count_pods_by_state(world: World) -> None:
    world.add_pod(a_kube_pod())
    agent = Agent(world)
    await agent.settle()
    agent.reconciler.count()
    assert agent.metrics.pods("enrolled").value == 1
    assert agent.metrics.pods("pending").value == 0
    agent.reconciler.close()


async def test_a_pod_annotated_by_an_earlier_agent_and_gone_from_the_mesh_is_released(
    world: World,
) -> None:
    world.add_pod(a_kube_pod(annotations={STATUS_ANNOTATION: "enabled"}))
    world.mesh = False
    await settle(world)
    assert world.is_untouched()
