from __future__ import annotations

from ztunnel.transport.deadlines import Deadlines


def test_each_is_called_when_due_and_once() -> None:
    deadlines, calls = Deadlines(), []
    deadlines.add(10.0, 1.0, lambda: calls.append("first"))
    deadlines.add(10.5, 1.0, lambda: calls.append("second"))
    deadlines.add(10.2, 0.3, lambda: calls.append("short"))
    deadlines.expire(9.9)
    assert calls == []
    deadlines.expire(10.2)
    assert sorted(calls) == ["first", "short"]
    deadlines.expire(11.0)
    deadlines.expire(12.0)
    assert sorted(calls) == ["first", "second", "short"]


def test_a_cancelled_one_is_not_called_and_holds_up_no_other() -> None:
    deadlines, calls = Deadlines(), []
    far = deadlines.add(99.0, 1.0, lambda: calls.append("far"))
    deadlines.add(10.0, 1.0, lambda: calls.append("near"))
    far.cancel()
    deadlines.expire(10.0)
    assert calls == ["near"]
    far.cancel()
    deadlines.expire(100.0)
    assert calls == ["near"]


def test_a_call_may_set_others_of_any_duration_and_may_fail() -> None:
    deadlines, calls = Deadlines(), []

    def callback() -> None:
        deadlines.add(10.0, 0.003, lambda: calls.append("later"))
        deadlines.add(10.0, 0.001, lambda: calls.append("later"))
        raise RuntimeError("a bug")

    for seconds in (0.001, 0.002):
        deadlines.add(10.0, seconds, callback)
    deadlines.expire(10.0)
    assert calls == []  # never in the same round: one that renews itself would stop the world
    deadlines.expire(10.0)
    assert calls == ["later"] * 4
