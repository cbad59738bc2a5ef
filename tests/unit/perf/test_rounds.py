"""Which results of a load are believed."""

from __future__ import annotations

import pytest

from perf.load import LoadError
from perf.rounds import check, noted
from perf.shapes import SHAPES

SHAPE = next(shape for shape in SHAPES if shape.name == "connect-16")


@pytest.mark.parametrize(
    ("count", "moved", "failures"),
    [
        pytest.param(1000, 0, 0, id="calls"),
        pytest.param(0, 1000, 0, id="bytes"),
        pytest.param(10_000, 0, 5, id="a failure now and then"),
    ],
)
def test_work_that_was_done_counts(count: int, moved: int, failures: int) -> None:
    check(SHAPE, {"count": count, "bytes": moved, "failures": failures})


@pytest.mark.parametrize(
    ("count", "failures"),
    [
        pytest.param(0, 0, id="nothing got through"),
        pytest.param(0, 9000, id="everything failed, and fast"),
        pytest.param(1000, 50, id="too much failed"),
    ],
)
def test_what_fails_fast_does_not_look_fast(count: int, failures: int) -> None:
    with pytest.raises(LoadError, match="failed and"):
        check(SHAPE, {"count": count, "bytes": 0, "failures": failures})


def test_what_one_of_them_cannot_is_said_and_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with noted("ours"):
        raise ExceptionGroup("a nursery", [ExceptionGroup("another", [LoadError("it broke")])])
    assert capsys.readouterr().err.strip() == "ours: it broke"


def test_a_mistake_of_the_runner_itself_does_end_it() -> None:
    with pytest.RaisesGroup(KeyError), noted("ours"):
        raise ExceptionGroup("a nursery", [KeyError("a bug")])
