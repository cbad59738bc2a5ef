from __future__ import annotations

import random

from hypothesis import given, strategies as st

from cni.agent.agenda import FIRST_RETRY_SECONDS, RETRY_SECONDS_MAX, Agenda
from ztunnel.model.workload import PodUid

A, B, C = PodUid("a"), PodUid("b"), PodUid("c")


def an_agenda(parallel_max: int = 8) -> Agenda:
    return Agenda(random.Random(1), parallel_max=parallel_max)


def test_the_pod_that_waits_longest_comes_first() -> None:
    agenda = an_agenda()
    agenda.mark(B, 1)
    agenda.mark(A, 2)
    assert [agenda.take(3), agenda.take(3), agenda.take(3)] == [B, A, None]


def test_a_pod_is_looked_at_by_one_at_a_time_and_again_if_marked_meanwhile() -> None:
    agenda = an_agenda()
    agenda.mark(A, 0)
    assert agenda.take(0) == A
    agenda.mark(A, 1)
    assert agenda.take(1) is None
    agenda.finish(A, 2, succeeded=True)
    assert agenda.take(2) == A
    agenda.finish(A, 3, succeeded=True)
    assert (agenda.take(9), len(agenda)) == (None, 0)


def test_no_more_than_so_many_at_a_time() -> None:
    agenda = an_agenda(parallel_max=2)
    for uid in (A, B, C):
        agenda.mark(uid, 0)
    assert [agenda.take(0), agenda.take(0), agenda.take(0)] == [A, B, None]
    assert agenda.wake_at() is None
    agenda.finish(A, 1, succeeded=True)
    assert agenda.take(1) == C


def test_failures_wait_longer_and_longer() -> None:
    agenda = an_agenda()
    agenda.mark(A, 0)
    now, delays = 0.0, []
    for _ in range(20):
        assert agenda.take(now) == A
        agenda.finish(A, now, succeeded=False)
        due = agenda.wake_at()
        assert due is not None
        delays.append(due - now)
        now = due
    assert FIRST_RETRY_SECONDS / 2 <= delays[0] <= FIRST_RETRY_SECONDS
    assert RETRY_SECONDS_MAX / 2 <= delays[-1] <= RETRY_SECONDS_MAX
    assert agenda.failures(A) == 20


def test_a_mark_ends_the_wait_and_success_the_count() -> None:
    agenda = an_agenda()
    agenda.mark(A, 0)
    agenda.take(0)
    agenda.finish(A, 0, succeeded=False)
    assert agenda.take(0) is None
    agenda.mark(A, 0.01)
    assert agenda.take(0.01) == A
    assert agenda.failures(A) == 1
    agenda.finish(A, 1, succeeded=True)
    assert agenda.failures(A) == 0


@given(st.lists(st.tuples(st.sampled_from("mtsf"), st.sampled_from([A, B, C])), max_size=60))
def test_whatever_is_marked_is_looked_at_in_the_end(steps: list[tuple[str, PodUid]]) -> None:
    agenda = an_agenda(parallel_max=2)
    running: set[PodUid] = set()
    owed: set[PodUid] = set()
    for now, (step, uid) in enumerate(steps):
        if step == "m":
            agenda.mark(uid, now)
            owed.add(uid)
        elif step == "t" and (taken := agenda.take(now)) is not None:
            assert taken not in running
            running.add(taken)
            owed.discard(taken)
        elif step in "sf" and uid in running:
            running.discard(uid)
            agenda.finish(uid, now, succeeded=step == "s")
            if step == "f":
                owed.add(uid)
        assert len(running) <= 2
    for uid in list(running):
        agenda.finish(uid, 1000, succeeded=True)
    seen = set()
    while (taken := agenda.take(2000)) is not None:
        seen.add(taken)
        agenda.finish(taken, 2000, succeeded=True)
    assert seen == owed
    assert len(agenda) == 0
