from __future__ import annotations

import pytest

from tests.support.builders import a_workload
from ztunnel.model.workload import Workload, WorkloadUid
from ztunnel.state.endpoints import (
    CHANGE_ENDPOINTS,
    CHANGES_MIN,
    FOLLOWERS_MAX,
    Endpoints,
)

A = a_workload("a", uid="a")


class Notes:
    """A follower that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def changed(self, uid: WorkloadUid, workload: Workload | None) -> None:
        self.told.append(f"{uid} {'gone' if workload is None else workload.name}")


def following(endpoints: Endpoints, *keys: object) -> list[Notes]:
    found = [Notes() for _ in keys]
    for key, one in zip(keys, found, strict=True):
        endpoints.follow(key, one)
    return found


def test_a_follower_is_told_of_each_change_when_it_is_asked_for() -> None:
    endpoints = Endpoints()
    assert endpoints.followed("x") is None
    [notes] = following(endpoints, "x")
    endpoints.put(A)
    assert notes.told == []
    assert endpoints.followed("x") is notes
    assert notes.told == ["a a"]
    endpoints.remove(A.uid)
    assert endpoints.followed("x") is notes
    assert endpoints.followed("x") is notes
    assert notes.told == ["a a", "a gone"]


def test_what_came_and_went_meanwhile_is_told_once() -> None:
    endpoints = Endpoints()
    [notes] = following(endpoints, "x")
    for name in ("one", "two"):
        endpoints.put(a_workload(name, uid="a"))
        endpoints.put(a_workload(name, uid="b"))
    endpoints.remove(WorkloadUid("b"))
    endpoints.followed("x")
    assert notes.told == ["a two", "b gone"]


def test_each_of_several_followers_is_told_what_it_does_not_know() -> None:
    endpoints = Endpoints()
    often, seldom = following(endpoints, "often", "seldom")
    endpoints.put(A)
    endpoints.followed("often")
    endpoints.put(a_workload("b", uid="b"))
    endpoints.followed("often")
    endpoints.followed("seldom")
    assert often.told == seldom.told == ["a a", "b b"]
    [late] = following(endpoints, "late")
    endpoints.put(a_workload("c", uid="c"))
    endpoints.followed("late")
    assert late.told == ["c c"]


@pytest.mark.parametrize("members", [0, 100 * CHANGE_ENDPOINTS])
def test_one_that_is_asked_no_more_is_dropped_and_costs_nothing_before(members: int) -> None:
    endpoints = Endpoints()
    for number in range(members):
        endpoints.put(a_workload(uid=f"w-{number}"))
    asked, forgotten = following(endpoints, "asked", "forgotten")
    most = max(CHANGES_MIN, members // CHANGE_ENDPOINTS)
    for number in range(most):
        endpoints.put(a_workload(uid=f"w-{number}"))
        endpoints.followed("asked")
    assert endpoints.followed("forgotten") is forgotten
    for _ in range(3 * most):
        endpoints.put(A)
        assert endpoints.followed("asked") is asked
    assert endpoints.followed("forgotten") is None
    assert len(forgotten.told) == most
    endpoints.put(a_workload(uid="last"))
    assert endpoints.followed("asked") is asked
    assert asked.told[-1] == "last cart-0"


def test_no_follower_outlives_a_change_of_the_service() -> None:
    endpoints = Endpoints()
    following(endpoints, "x")
    endpoints.forget()
    assert endpoints.followed("x") is None


def test_followers_are_bounded() -> None:
    endpoints = Endpoints()
    following(endpoints, *range(FOLLOWERS_MAX))
    endpoints.put(A)
    assert endpoints.followed(1) is not None
    following(endpoints, "one more")
    assert all(endpoints.followed(number) is None for number in range(FOLLOWERS_MAX))
    assert endpoints.followed("one more") is not None
