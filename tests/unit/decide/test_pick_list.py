from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from hypothesis import given, strategies as st

from tests.support.builders import a_workload
from tests.support.picks import chances
from ztunnel.decide.pick_list import PickList
from ztunnel.model.workload import Workload, WorkloadUid


def an_endpoint(name: str, rank: int = 0, capacity: int = 1) -> Workload:
    """An endpoint whose rank stands in its node's name; below zero it is not eligible."""
    return a_workload(name, uid=name, node=str(rank), capacity=capacity)


def sort(workloads: Iterable[Workload]) -> dict[int, list[Workload]]:
    found: dict[int, list[Workload]] = {}
    for one in workloads:
        if int(one.node) >= 0:
            found.setdefault(int(one.node), []).append(one)
    return found


def wanted(there: Iterable[Workload]) -> dict[str, Fraction]:
    """Say the same, by the rule: the best rank, each by its capacity."""
    ranked = sort(there)
    best = ranked[max(ranked)] if ranked else []
    total = sum(one.capacity for one in best)
    return {one.name: Fraction(one.capacity, total) for one in best if one.capacity}


an_event = st.tuples(
    st.booleans(), st.sampled_from("abcdefgh"), st.integers(-1, 2), st.integers(0, 3)
)


@given(start=st.lists(an_event, max_size=6), events=st.lists(an_event, max_size=30))
def test_a_list_that_keeps_up_is_the_list_made_anew(
    start: list[tuple[bool, str, int, int]], events: list[tuple[bool, str, int, int]]
) -> None:
    there = {name: an_endpoint(name, rank, weight) for _, name, rank, weight in start}
    listed = PickList(sort, there.values())
    for is_there, name, rank, weight in events:
        if is_there:
            there[name] = an_endpoint(name, rank, weight)
        else:
            there.pop(name, None)
        listed.changed(WorkloadUid(name), there.get(name))
        assert chances(listed.best.draw) == wanted(there.values())
        ranked = sort(there.values())
        assert [{one.name for one in lot} for lot in listed.by_rank()] == [
            {one.name for one in ranked[rank]} for rank in sorted(ranked, reverse=True)
        ]
        assert all(one is there[one.name] for lot in listed.by_rank() for one in lot)


def test_losing_all_of_the_best_rank_leads_to_the_next_and_back() -> None:
    best, second = an_endpoint("best", 1), an_endpoint("next", 0)
    listed = PickList(sort, [best, second])
    assert list(listed.best) == [best]
    listed.changed(best.uid, None)
    assert list(listed.best) == [second]
    listed.changed(best.uid, best)
    assert list(listed.best) == [best]


def test_a_list_that_was_empty_fills() -> None:
    listed = PickList(sort, [])
    assert listed.best.draw(random.Random(1)) is None
    listed.changed(WorkloadUid("not eligible"), an_endpoint("not eligible", -1))
    listed.changed(WorkloadUid("b"), an_endpoint("b"))
    assert [one.name for one in listed.best] == ["b"]


def test_each_is_drawn_by_its_capacity_after_changes_too() -> None:
    listed = PickList(sort, [an_endpoint("a"), an_endpoint("b"), an_endpoint("gone", 0, 9)])
    listed.changed(WorkloadUid("gone"), None)
    listed.changed(WorkloadUid("b"), an_endpoint("b", 0, 3))
    rng = random.Random(7)
    drawn = Counter(one.name for _ in range(2000) if (one := listed.best.draw(rng)))
    assert set(drawn) == {"a", "b"}
    assert 2.5 < drawn["b"] / drawn["a"] < 3.6


def test_a_change_looks_at_one_endpoint_however_many_there_are() -> None:
    looked: list[int] = []

    def counting(workloads: Iterable[Workload]) -> dict[int, list[Workload]]:
        there = list(workloads)
        looked.append(len(there))
        return sort(there)

    near, far = an_endpoint("near", 1), [an_endpoint(f"far-{n}", 0) for n in range(1000)]
    listed = PickList(counting, [near, *far])
    for _ in range(3):  # the only one of the best rank comes and goes
        listed.changed(near.uid, None)
        listed.changed(near.uid, near)
    assert looked == [1001, 1, 1, 1]
