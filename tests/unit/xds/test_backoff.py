from __future__ import annotations

from random import Random

from hypothesis import given, strategies as st

from ztunnel.xds.backoff import FIRST_SECONDS, FLOOR_SECONDS, HEALTHY_SECONDS, MAX_SECONDS, Backoff


@given(seed=st.integers(), lives=st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_a_wait_is_never_nothing_and_never_too_long(seed: int, lives: list[float]) -> None:
    backoff = Backoff(Random(seed))
    assert all(FLOOR_SECONDS <= backoff.after(life) <= MAX_SECONDS for life in lives)


def longest(after: list[float]) -> float:
    """Give the longest wait after the last of these lives, over many dice."""
    waits = []
    for seed in range(300):
        backoff = Backoff(Random(seed))
        waits.append([backoff.after(life) for life in after][-1])
    return max(waits)


def test_failures_in_a_row_wait_longer_and_longer_up_to_a_limit() -> None:
    assert longest([0.0]) <= FIRST_SECONDS
    assert FIRST_SECONDS < longest([0.0] * 2) <= 2 * FIRST_SECONDS
    assert 0.9 * MAX_SECONDS < longest([0.0] * 30) <= MAX_SECONDS


def test_a_stream_that_dies_young_counts_as_a_failure() -> None:
    assert longest([HEALTHY_SECONDS / 2] * 10) > FIRST_SECONDS


def test_a_healthy_stream_begins_anew() -> None:
    assert longest([0.0] * 10 + [HEALTHY_SECONDS]) <= FIRST_SECONDS


def test_nodes_do_not_come_back_in_step() -> None:
    assert len({Backoff(Random(seed)).after(0.0) for seed in range(10)}) == 10
