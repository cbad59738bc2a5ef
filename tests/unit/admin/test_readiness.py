from __future__ import annotations

from ztunnel.admin.readiness import STATE_MANAGER, WORKLOAD_MANAGER, Readiness


def test_nothing_pending_is_ready() -> None:
    readiness = Readiness()
    assert readiness.is_ready
    assert readiness.text() == "ready\n"


def test_pending_tasks_are_named_in_order() -> None:
    readiness = Readiness(WORKLOAD_MANAGER, STATE_MANAGER)
    assert not readiness.is_ready
    assert readiness.text() == "not ready, pending: state manager, workload proxy manager\n"


def test_clearing_says_how_many_are_left() -> None:
    readiness = Readiness(STATE_MANAGER, WORKLOAD_MANAGER)
    assert readiness.clear(STATE_MANAGER) == 1
    assert readiness.clear(STATE_MANAGER) is None
    assert readiness.clear(WORKLOAD_MANAGER) == 0
    assert readiness.is_ready


def test_a_task_that_was_done_can_be_pending_again() -> None:
    readiness = Readiness(WORKLOAD_MANAGER)
    readiness.clear(WORKLOAD_MANAGER)
    readiness.register(WORKLOAD_MANAGER)
    assert readiness.pending == (WORKLOAD_MANAGER,)
