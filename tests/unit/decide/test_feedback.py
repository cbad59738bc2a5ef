from __future__ import annotations

import math

import pytest

from tests.support.builders import a_workload
from ztunnel.decide.feedback import Feedback
from ztunnel.model.settings import Balancing

A = a_workload("a", capacity=2)


def test_connections_are_counted_while_they_last() -> None:
    feedback = Feedback(Balancing.LEAST_CONNECTIONS)
    feedback.begun(A)
    feedback.begun(A)
    assert feedback.live(A) == 2
    feedback.ended(A)
    feedback.ended(A)
    assert feedback.live(A) == 0


def test_nothing_is_counted_that_nobody_looks_at() -> None:
    feedback = Feedback(Balancing.RANDOM)
    feedback.begun(A)
    assert feedback.live(A) == 0
    feedback.ended(A)


@pytest.mark.parametrize(("capacity", "load"), [(1, 2.0), (2, 1.0), (0, math.inf)])
def test_load_is_what_one_more_would_make_of_it(capacity: int, load: float) -> None:
    feedback = Feedback(Balancing.LEAST_CONNECTIONS)
    workload = a_workload("a", capacity=capacity)
    feedback.begun(workload)
    assert feedback.load(workload) == load
