from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, strategies as st

from tests.support.builders import a_workload
from ztunnel.decide.pick_list import PickList
from ztunnel.model.workload import Workload


def an_endpoint(name: str, rank: int = 0, capacity: int = 1) -> Workload:
    """An endpoint whose rank stands in its node's name; below zero it is not eligible."""
    return a_workload(name, uid=name, node=str(rank), capacity=capacity)


def judge(workload: Workload) -> int | None:
    rank = int(workload.node)
    return None if rank < 0 else rank


def names(listed: PickList) -> set[str]:
    return {one.name for one in listed.workloads}


an_event = st.tuples(
    st.booleans(), st.sampled_from("abcdefgh"), st.integers(-1, 2), st.integers(0, 3)
)


@given(start=st.lists(an_event, max_size=6), events=st.lists(an_event, max_size=30))
def test_a_list_that_keeps_up_is_the_list_made_anew(
    start: list[tuple[bool, str, int, int]], events: list[tuple[bool, str, int, int]]
) -> None:
    there = {name: an_endpoint(name, rank, weight) for _, name, rank, weight in start}
    listed = PickList(judge, there.values())
    for is_there, name, rank, weight in events:
        if is_there:
            there[name] = an_endpoint(name, rank, weight)
            keeps_up = listed.put(there[name])
        else:
            there.pop(name, None)
            keeps_up = listed.remove(a_workload(name, uid=name).uid)
        anew = PickList(judge, there.values())
        if not keeps_up:
            listed = anew
        assert names(listed) == names(anew)
        assert all(one is there[one.name] for one in listed.workloads)
        drawn = listed.draw(random.Random(1))
        assert (drawn is None) == (not any(one.capacity for one in listed.workloads))


def test_losing_all_of_the_best_rank_asks_for_the_next() -> None:
    listed = PickList(judge, [an_endpoint("best", 1), an_endpoint("next", 0)])
    assert not listed.remove(an_endpoint("best").uid)


def test_a_list_in_which_all_were_alike_never_has_to_be_made_anew() -> None:
    listed = PickList(judge, [an_endpoint("a")])
    assert listed.remove(an_endpoint("a").uid)
    assert listed.put(an_endpoint("not eligible", -1))
    assert listed.put(an_endpoint("b"))
    assert names(listed) == {"b"}


def test_each_is_drawn_by_its_capacity_after_changes_too() -> None:
    listed = PickList(judge, [an_endpoint("a"), an_endpoint("b"), an_endpoint("gone", 0, 9)])
    listed.remove(an_endpoint("gone").uid)
    listed.put(an_endpoint("b", 0, 3))
    rng = random.Random(7)
    drawn = Counter(one.name for _ in range(2000) if (one := listed.draw(rng)))
    assert set(drawn) == {"a", "b"}
    assert 2.5 < drawn["b"] / drawn["a"] < 3.6
