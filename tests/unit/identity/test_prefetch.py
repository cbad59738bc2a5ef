from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.builders import a_workload, an_identity
from ztunnel.identity.prefetch import FORGET_SECONDS, LocalIdentities, Prefetcher
from ztunnel.model.identity import Identity
from ztunnel.model.workload import TunnelProtocol, Workload
from ztunnel.state.store import Store, Update

HERE, CART = "node-1", an_identity("cart")


def a_pod(
    name: str = "cart-0", *, sa: str = "cart", node: str = HERE, hbone: bool = True, **more: object
) -> Workload:
    protocol = TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE
    return a_workload(name, sa=sa, node=node, protocol=protocol, ips=(), **more)


def told(identities: LocalIdentities, pod: Workload, now: float = 0.0) -> Identity | None:
    return identities.changed(pod.uid, pod, now)


@pytest.mark.parametrize(
    ("pod", "wanted"),
    [
        pytest.param(a_pod(), CART, id="a pod of ours in the mesh"),
        pytest.param(a_pod(hbone=False, native_tunnel=True), CART, id="one with a native tunnel"),
        pytest.param(a_pod(hbone=False), None, id="a pod outside the mesh"),
        pytest.param(a_pod(node="node-2"), None, id="a pod of another node"),
    ],
)
def test_only_what_is_likely_to_be_needed_is_prefetched(
    pod: Workload, wanted: Identity | None
) -> None:
    assert told(LocalIdentities(HERE), pod) == wanted


def test_without_a_node_name_nothing_is_prefetched_but_all_is_counted() -> None:
    identities = LocalIdentities("")
    pod = a_pod(node="anywhere")
    assert told(identities, pod) is None
    identities.changed(pod.uid, None, 0.0)
    assert identities.take_forgotten(FORGET_SECONDS) == [CART]


def test_an_identity_is_forgotten_a_minute_after_its_last_workload() -> None:
    identities = LocalIdentities(HERE)
    one, other = a_pod("cart-0"), a_pod("cart-1", hbone=False)
    told(identities, one)
    told(identities, other)
    identities.changed(one.uid, None, 10.0)
    assert identities.next_due() == math.inf, "another workload has it"
    identities.changed(other.uid, None, 20.0)
    assert identities.next_due() == 20 + FORGET_SECONDS
    assert identities.take_forgotten(20 + FORGET_SECONDS - 0.1) == []
    assert identities.take_forgotten(20 + FORGET_SECONDS) == [CART]
    assert identities.take_forgotten(math.inf) == []


def test_an_identity_that_comes_back_in_time_is_kept() -> None:
    identities = LocalIdentities(HERE)
    pod, successor = a_pod("cart-0"), a_pod("cart-1")
    told(identities, pod)
    identities.changed(pod.uid, None, 10.0)
    assert told(identities, successor, 69.0) == CART
    assert identities.take_forgotten(math.inf) == []


def test_a_pod_that_moves_to_another_node_has_left() -> None:
    identities = LocalIdentities(HERE)
    told(identities, a_pod())
    told(identities, a_pod(node="node-2"), 5.0)
    assert identities.take_forgotten(5 + FORGET_SECONDS) == [CART]


def test_a_pod_that_changes_its_account_leaves_the_old_identity() -> None:
    identities = LocalIdentities(HERE)
    told(identities, a_pod())
    assert told(identities, a_pod(sa="other"), 5.0) == an_identity("other")
    assert identities.take_forgotten(5 + FORGET_SECONDS) == [CART]


def test_news_of_a_workload_that_never_was_ours_is_nothing() -> None:
    identities = LocalIdentities(HERE)
    assert identities.changed(a_pod().uid, None, 0.0) is None
    assert identities.next_due() == math.inf


steps = st.lists(
    st.tuples(
        st.integers(0, 3),  # which pod
        st.sampled_from(["a", "b", None]),  # its account now; None = gone
        st.sampled_from([HERE, "node-2"]),
        st.floats(0, 50),  # seconds since the step before
    ),
    max_size=30,
)


@given(steps=steps)
def test_exactly_the_identities_that_stayed_away_are_forgotten(steps: list[tuple]) -> None:
    identities, now = LocalIdentities(HERE), 0.0
    here: dict[int, str] = {}
    left: dict[str, float] = {}
    for number, account, node, seconds in steps:
        now += seconds
        due = {name for name, time in left.items() if time + FORGET_SECONDS <= now}
        assert {one.service_account for one in identities.take_forgotten(now)} == due
        for name in due:
            del left[name]
        pod = a_pod(f"p{number}", sa=account or "x", node=node)
        before = here.pop(number, None)
        if account is not None and node == HERE:
            here[number] = account
            left.pop(account, None)
        if before is not None and before not in here.values():
            left[before] = now
        identities.changed(pod.uid, None if account is None else pod, now)
    assert {one.service_account for one in identities.take_forgotten(math.inf)} == set(left)


class FakeKeeper:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def prefetch(self, identity: Identity) -> None:
        self.heard.append(("prefetch", identity.service_account))

    def forget(self, identity: Identity) -> None:
        self.heard.append(("forget", identity.service_account))


@asynccontextmanager
async def a_prefetcher(store: Store, keeper: FakeKeeper) -> AsyncIterator[list[Identity]]:
    dropped: list[Identity] = []
    prefetcher = Prefetcher(store, keeper, LocalIdentities(HERE), forget=dropped.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(prefetcher.run)
        yield dropped
        nursery.cancel_scope.cancel()


async def test_the_store_is_followed(autojump_clock: MockClock) -> None:
    store, keeper = Store(node=HERE), FakeKeeper()
    store.apply(Update(workloads=[a_pod("early", sa="early")]))
    async with a_prefetcher(store, keeper) as dropped:
        store.apply(Update(workloads=[a_pod()]))
        assert keeper.heard == [("prefetch", "early"), ("prefetch", "cart")]
        store.apply(Update(removed_workloads=[a_pod().uid]))
        await trio.sleep(FORGET_SECONDS - 1)
        assert len(keeper.heard) == 2
        await trio.sleep(2)
        assert keeper.heard[2:] == [("forget", "cart")]
        assert dropped == [CART], "contexts go with the certificate"


async def test_a_storm_of_pods_loses_neither_prefetch_nor_forget(autojump_clock: MockClock) -> None:
    store, keeper = Store(node=HERE), FakeKeeper()
    pods = [a_pod(f"pod-{n}", sa=f"sa-{n}") for n in range(1000)]
    async with a_prefetcher(store, keeper):
        store.apply(Update(workloads=pods))
        store.apply(Update(removed_workloads=[pod.uid for pod in pods]))
        await trio.sleep(FORGET_SECONDS + 1)
    for kind in ("prefetch", "forget"):
        assert sum(heard[0] == kind for heard in keeper.heard) == 1000


async def test_when_stopped_it_listens_no_more(autojump_clock: MockClock) -> None:
    store, keeper = Store(node=HERE), FakeKeeper()
    async with a_prefetcher(store, keeper):
        await wait_all_tasks_blocked()
    store.apply(Update(workloads=[a_pod()]))
    assert keeper.heard == []
