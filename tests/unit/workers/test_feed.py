"""Whatever happens to a store, whoever is fed gets to the same state."""

from __future__ import annotations

from hypothesis import given, strategies as st

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.policy import PolicyScope
from ztunnel.model.workload import WorkloadUid
from ztunnel.state.store import Store, Update
from ztunnel.workers.feed import POLICIES_TOGETHER, SLICE_ITEMS, Feed

WORKLOADS = [
    a_workload(f"pod-{name}", ips=[f"192.0.2.{address}"])
    for name in range(4)
    for address in range(2)  # others may come to have the address, and this pod another
]
SERVICES = [a_service(f"svc-{name}", vips=[f"10.0.0.{name}"]) for name in range(3)]
POLICIES = [a_policy(name=f"policy-{name}", scope=PolicyScope.NAMESPACE) for name in range(3)]

puts = st.builds(
    lambda workloads, services, policies: Update(
        workloads=workloads, services=services, policies=policies
    ),
    st.lists(st.sampled_from(WORKLOADS), max_size=3),
    st.lists(st.sampled_from(SERVICES), max_size=2),
    st.lists(st.sampled_from(POLICIES), max_size=2),
)
removals = st.builds(
    lambda workloads, services, policies: Update(
        removed_workloads=[one.uid for one in workloads],
        removed_services=[one.key for one in services],
        removed_policies=[one.key for one in policies],
    ),
    st.lists(st.sampled_from(WORKLOADS), max_size=3),
    st.lists(st.sampled_from(SERVICES), max_size=2),
    st.lists(st.sampled_from(POLICIES), max_size=2),
)


def held(store: Store) -> tuple[dict[str, object], ...]:
    return (
        {one.uid: one for one in store.workloads.all()},
        {one.key: one for one in store.services.all()},
        {one.key: one for one in store.policies.all()},
    )


@given(
    st.lists(puts | removals, max_size=8),
    st.lists(st.tuples(puts | removals, st.integers(0, 3)), max_size=12),
    st.integers(1, 5),
)
def test_a_fed_store_ends_like_the_one_it_is_fed_from(
    before: list[Update], after: list[tuple[Update, int]], most: int
) -> None:
    origin, fed = Store(), Store()
    for update in before:
        origin.apply(update)
    feed = Feed(origin)
    origin.subscribe(feed.changed)
    for update, parts in after:
        origin.apply(update)
        for _ in range(parts):
            if (part := feed.take(most, most)) is not None:
                fed.apply(part)
    while (part := feed.take(most, most)) is not None:
        fed.apply(part)
    assert held(fed) == held(origin)
    assert not feed


def test_a_usual_change_goes_out_as_a_whole() -> None:
    store = Store()
    store.apply(Update(workloads=WORKLOADS[:1]))
    feed = Feed(store)
    store.subscribe(feed.changed)
    feed.take()
    successor = a_workload("pod-9", ips=["192.0.2.0"])
    store.apply(
        Update(workloads=[successor], removed_workloads=[WORKLOADS[0].uid], policies=POLICIES[:1])
    )
    part = feed.take()
    assert part is not None
    assert (part.removed_workloads, part.workloads) == ((WORKLOADS[0].uid,), (successor,))
    assert part.policies == (POLICIES[0],)
    assert feed.take() is None


def test_a_new_policy_is_told_before_the_one_it_replaces_is_gone() -> None:
    store = Store()
    store.apply(Update(policies=POLICIES[:1]))
    feed = Feed(store)
    store.subscribe(feed.changed)
    feed.take()
    store.apply(Update(policies=POLICIES[1:2], removed_policies=[POLICIES[0].key]))
    first, second = feed.take(1, 1), feed.take(1, 1)
    assert first is not None
    assert second is not None
    assert (first.policies, first.removed_policies) == ((POLICIES[1],), ())
    assert (second.policies, second.removed_policies) == ((), (POLICIES[0].key,))


def test_policies_that_change_together_are_told_together_and_before_any_workload() -> None:
    store = Store()
    feed = Feed(store)
    store.subscribe(feed.changed)
    policies = [
        a_policy(name=f"{number}", scope=PolicyScope.NAMESPACE)
        for number in range(POLICIES_TOGETHER + 10)
    ]
    store.apply(
        Update(workloads=[a_workload(f"pod-{number}") for number in range(40)], policies=policies)
    )
    told = []
    for _ in range(2):
        part = feed.take()
        assert part is not None
        told.append((len(list(part.policies)), len(list(part.workloads))))
    assert told == [(POLICIES_TOGETHER, 0), (10, SLICE_ITEMS)]


def test_what_came_and_went_untold_is_told_as_gone_only() -> None:
    store = Store()
    feed = Feed(store)
    store.subscribe(feed.changed)
    store.apply(Update(workloads=WORKLOADS[:1]))
    store.apply(Update(removed_workloads=[WORKLOADS[0].uid]))
    part = feed.take()
    assert part == Update(
        removed_workloads=(WorkloadUid(WORKLOADS[0].uid),),
        removed_services=(), removed_policies=(), workloads=(), services=(), policies=(),
    )  # fmt: skip


def test_a_worker_that_starts_late_is_told_part_by_part_what_there_is_by_then() -> None:
    store, fed = Store(), Store()
    pods = [a_workload(f"pod-{number}", ips=["10.0.0.1"]) for number in range(500)]
    store.apply(Update(workloads=pods))
    feed = Feed(store)
    store.subscribe(feed.changed)
    assert not feed._early, "nothing is looked at before it is asked for"
    successor = a_workload("new", ips=["10.0.0.1"])  # the latest who says so has the address
    store.apply(
        Update(workloads=[successor], removed_workloads=[pods[1].uid, *[p.uid for p in pods[250:]]])
    )
    most = 0
    while (part := feed.take()) is not None:
        fed.apply(part)
        most = max(most, len(feed._early))
    assert fed.workloads.by_address(Network(""), parse_ip("10.0.0.1")) == successor
    assert held(fed) == held(store)
    assert most < 100
    assert not feed
