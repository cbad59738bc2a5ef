from __future__ import annotations

import pytest

from tests.support.builders import a_workload
from ztunnel.model.workload import Workload, WorkloadUid
from ztunnel.state.endpoints import FOLLOWERS_MAX, MEMO_ENTRIES_MAX, Endpoints

A = a_workload("a", uid="a")


class Notes:
    """A follower that writes down what it is told, and keeps up as long as it may."""

    def __init__(self, *, keeps_up: bool = True) -> None:
        self.told: list[str] = []
        self._keeps_up = keeps_up

    def put(self, workload: Workload) -> bool:
        self.told.append(f"put {workload.uid}")
        return self._keeps_up

    def remove(self, uid: WorkloadUid) -> bool:
        self.told.append(f"remove {uid}")
        return self._keeps_up


def change(endpoints: Endpoints, *, how: str) -> None:
    match how:
        case "put":
            endpoints.put(A)
        case "remove":
            endpoints.remove(A.uid)
        case _:
            endpoints.forget()


@pytest.mark.parametrize("how", ["put", "remove", "forget"])
def test_an_answer_is_remembered_until_something_changes(how: str) -> None:
    endpoints = Endpoints()
    count = iter(range(100))
    assert endpoints.remember("x", lambda: next(count)) == 0
    assert endpoints.remember("x", lambda: next(count)) == 0
    change(endpoints, how=how)
    assert endpoints.remember("x", lambda: next(count)) == 1


def test_answers_are_remembered_for_a_bounded_number_of_callers() -> None:
    endpoints = Endpoints()
    for number in range(MEMO_ENTRIES_MAX + 1):
        endpoints.remember(number, lambda: "answer")
    assert endpoints.remember(0, lambda: "computed again") == "computed again"


def test_a_follower_is_told_of_each_change() -> None:
    endpoints = Endpoints()
    notes = endpoints.follow("x", Notes)
    endpoints.put(A)
    endpoints.remove(A.uid)
    assert notes.told == ["put a", "remove a"]
    assert endpoints.follow("x", Notes) is notes


@pytest.mark.parametrize("how", ["put", "remove"])
def test_a_follower_that_does_not_keep_up_is_made_anew(how: str) -> None:
    endpoints = Endpoints()
    notes = endpoints.follow("x", lambda: Notes(keeps_up=False))
    change(endpoints, how=how)
    assert endpoints.follow("x", Notes) is not notes


def test_no_follower_outlives_a_change_of_the_service() -> None:
    endpoints = Endpoints()
    notes = endpoints.follow("x", Notes)
    endpoints.forget()
    assert endpoints.follow("x", Notes) is not notes


def test_followers_are_bounded() -> None:
    endpoints = Endpoints()
    first = endpoints.follow(0, Notes)
    for number in range(1, FOLLOWERS_MAX + 1):
        endpoints.follow(number, Notes)
    assert endpoints.follow(0, Notes) is not first
