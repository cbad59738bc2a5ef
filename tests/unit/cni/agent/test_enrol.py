from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.agent.enrol import Enrolment, State
from cni.agent.errors import KubeError, NetnsError, NoProxyError, ProxyRefusedError, UnservedError
from cni.redirect.errors import RedirectError
from cni.redirect.plan import RedirectPlan
from tests.support.namespaces import open_descriptors
from tests.support.node_world import A, Agent, World, a_kube_pod
from ztunnel.errors import ZtunnelError

PLAN = RedirectPlan()


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.add_pod(a_kube_pod()).ips  # noqa: B018 - the pod has addresses
    return world


@pytest.fixture
def enrolment(world: World) -> Iterator[Enrolment]:
    enrolment = Enrolment(uid=A, ips=world.pods[A].ips)
    yield enrolment
    enrolment.let_go()


async def enrol(world: World, enrolment: Enrolment, plan: RedirectPlan = PLAN) -> None:
    await Agent(world).enroller.enrol(world.pods[A], plan, enrolment)


async def test_a_pod_is_captured_before_it_is_served_and_announced_last(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    assert world.is_enrolled()
    assert enrolment.state is State.ENROLLED
    steps = ["find", "apply", "add", "ack", "put", "annotate enabled"]
    assert [call for call in world.calls if call in steps] == steps
    assert world.rules[world.space(A)][1] == "ztunnel-cni pod a"


async def test_what_is_in_order_is_only_looked_at(world: World, enrolment: Enrolment) -> None:
    await enrol(world, enrolment)
    world.calls.clear()
    await enrol(world, enrolment)
    assert world.calls == ["is alive", "inspect", "silent ports"]


async def test_rules_that_somebody_changed_are_repaired_and_counted(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    world.rules.clear()
    await enrol(world, enrolment)
    assert world.is_enrolled()
    assert enrolment.repairs == 1


async def test_rules_that_another_agent_wrote_alike_are_left_alone(
    world: World, enrolment: Enrolment
) -> None:
    world.rules[world.space(A)] = (PLAN, "")
    await enrol(world, enrolment)
    assert "apply" not in world.calls
    assert world.is_enrolled()


async def test_another_plan_replaces_the_rules_and_is_no_repair(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    await enrol(world, enrolment, RedirectPlan(dns=True))
    assert world.rules[world.space(A)][0] == RedirectPlan(dns=True)
    assert enrolment.repairs == 0


async def test_a_new_sandbox_is_enrolled_anew(world: World, enrolment: Enrolment) -> None:
    await enrol(world, enrolment)
    world.dead.add(world.space(A))
    world.new_space(A).close()
    await enrol(world, enrolment)
    assert world.is_enrolled()
    assert enrolment.repairs == 1


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        ("inspect", RedirectError("no")),
        ("apply", RedirectError("no")),
        ("ack", ProxyRefusedError("no")),
        ("put", RedirectError("no")),
    ],
)
async def test_a_pod_that_was_announced_and_fails_is_announced_as_pending(
    world: World, enrolment: Enrolment, call: str, failure: ZtunnelError
) -> None:
    await enrol(world, enrolment)
    world.rules.clear()
    world.served.clear()
    enrolment.exempted = frozenset()
    world.fail[call] = failure
    with pytest.raises(type(failure)):
        await enrol(world, enrolment)
    assert world.status() == "pending"
    assert (enrolment.state, enrolment.reason) == (State.PENDING, "no")
    del world.fail[call]
    await enrol(world, enrolment)
    assert world.is_enrolled()


async def test_a_namespace_that_is_not_found_is_announced_too(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    world.dead.add(world.space(A))
    del world.spaces[A]
    with pytest.raises(NetnsError):
        await enrol(world, enrolment)
    assert world.status() == "pending"


async def test_a_pod_that_was_never_captured_gets_no_annotation(
    world: World, enrolment: Enrolment
) -> None:
    world.fail["apply"] = RedirectError("no")
    with pytest.raises(RedirectError):
        await enrol(world, enrolment)
    assert world.status() is None


async def test_a_captured_pod_without_a_proxy_is_pending(
    world: World, enrolment: Enrolment
) -> None:
    world.has_proxy = False
    with pytest.raises(NoProxyError):
        await enrol(world, enrolment)
    assert world.status() == "pending"
    assert enrolment.state is State.PENDING


async def test_a_proxy_that_is_away_for_a_moment_changes_no_annotation(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    world.has_proxy = False
    world.served.clear()
    with pytest.raises(NoProxyError):
        await enrol(world, enrolment)
    assert world.status() == "enabled"


async def test_a_proxy_that_does_not_listen_is_asked_again_and_then_not_believed(
    world: World, enrolment: Enrolment
) -> None:
    world.listens = False
    with pytest.raises(UnservedError, match="nobody listens at 15001"):
        await enrol(world, enrolment)
    assert world.calls.count("ack") == 2
    assert world.status() == "pending"


async def test_rules_that_do_not_stay_are_an_error(world: World, enrolment: Enrolment) -> None:
    async def forget(*_: object) -> None:
        world.calls.append("apply")

    world.apply = forget  # type: ignore[method-assign]
    with pytest.raises(RedirectError, match="rules were written, but"):
        await enrol(world, enrolment)


async def test_an_annotation_that_cannot_be_written_is_an_error_after_all_else(
    world: World, enrolment: Enrolment
) -> None:
    world.fail["annotate enabled"] = KubeError("down")
    with pytest.raises(KubeError):
        await enrol(world, enrolment)
    assert world.served == {A: world.space(A)}


async def test_release_takes_the_rules_away_before_the_proxy(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    world.calls.clear()
    await Agent(world).enroller.release(enrolment, world.pods[A], lives=True)
    assert world.is_untouched()
    assert world.calls == ["drop", "is alive", "remove rules", "delete", "annotate None"]
    assert enrolment.netns is None


async def test_release_of_a_pod_that_is_gone_leaves_its_namespace_alone(
    world: World, enrolment: Enrolment
) -> None:
    await enrol(world, enrolment)
    del world.pods[A]
    await Agent(world).enroller.release(enrolment, None, lives=False)
    assert "remove rules" not in world.calls
    assert world.served == {}


@pytest.mark.parametrize("call", ["drop", "remove rules", "delete", "annotate None"])
async def test_a_release_that_failed_can_be_repeated(
    world: World, enrolment: Enrolment, call: str
) -> None:
    await enrol(world, enrolment)
    world.fail[call] = RedirectError("busy")
    with pytest.raises(RedirectError):
        await Agent(world).enroller.release(enrolment, world.pods[A], lives=True)
    assert enrolment.reason == "busy"
    assert enrolment.netns is not None
    world.fail.clear()
    await Agent(world).enroller.release(enrolment, world.pods[A], lives=True)
    assert world.is_untouched()


async def test_rules_whose_namespace_is_not_found_are_not_forgotten(
    world: World, enrolment: Enrolment
) -> None:
    space = world.spaces.pop(A)
    with pytest.raises(NetnsError, match="may still be there"):
        await Agent(world).enroller.release(enrolment, world.pods[A], lives=True)
    world.spaces[A] = space
    await Agent(world).enroller.release(enrolment, world.pods[A], lives=True)


async def test_a_withdrawn_sandbox_is_served_by_nobody(world: World, enrolment: Enrolment) -> None:
    await enrol(world, enrolment)
    before = open_descriptors()
    await Agent(world).enroller.withdraw(enrolment)
    assert (world.served, world.exempted, enrolment.netns) == ({}, {}, None)
    assert open_descriptors() == before - 1


async def test_our_own_annotation_counts_until_kubernetes_tells(
    world: World, enrolment: Enrolment
) -> None:
    pod = world.pods[A]
    await enrol(world, enrolment)
    assert (pod.status, enrolment.shown(pod)) == (None, "enabled")
    assert enrolment.shown(a_kube_pod(version="9")) is None
