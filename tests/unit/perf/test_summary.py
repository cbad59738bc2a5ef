"""Medians, spreads and ratios of a benchmark's rounds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from perf.questions import QUESTIONS
from perf.report import table, verdict
from perf.results import BUDGET, Results
from perf.rounds import Sample
from perf.shapes import P50, PER_SECOND, SHAPES, Metric, Question
from perf.summary import Spread, holds, ratio, spread

SHAPE = next(shape for shape in SHAPES if shape.name == "connect-16")


def rounds_of(contender: str, *rates: float) -> list[Sample]:
    return [Sample(SHAPE.name, contender, n, {"per_s": rate}) for n, rate in enumerate(rates)]


def results_of(*samples: Sample) -> Results:
    names = list(dict.fromkeys(sample.contender for sample in samples))
    machine = {"load_average_before": 0.0, "libraries": {}}
    return Results(names, rounds=3, seconds=1, samples=list(samples), machine=machine)


def test_a_spread_is_the_median_and_both_ends() -> None:
    samples = rounds_of("ours", 30, 10, 20)
    assert spread(samples, SHAPE.name, "ours", "per_s") == Spread(20, 10, 30)


def test_what_was_not_measured_has_no_spread_and_no_ratio() -> None:
    samples = rounds_of("ours", 1)
    assert spread(samples, SHAPE.name, "envoy", "per_s") is None
    assert ratio(samples, SHAPE.name, "ours", "envoy", PER_SECOND) is None


def test_a_ratio_compares_only_figures_of_the_same_round() -> None:
    # The machine was ten times slower in the last round; who was ahead did not change.
    samples = rounds_of("ours", 200, 220, 20) + rounds_of("envoy", 100, 100, 10)
    assert ratio(samples, SHAPE.name, "ours", "envoy", PER_SECOND) == Spread(2.0, 2.0, 2.2)


def test_a_round_that_one_of_them_missed_does_not_count() -> None:
    samples = rounds_of("ours", 10, 99) + rounds_of("envoy", 10)
    assert ratio(samples, SHAPE.name, "ours", "envoy", PER_SECOND) == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "metric", "reached"),
    [
        (1.2, PER_SECOND, True),
        (1.0, PER_SECOND, True),
        (0.9, PER_SECOND, False),
        (0.9, P50, True),
        (1.1, P50, False),
    ],
)
def test_whether_a_goal_of_1_is_reached_depends_on_which_way_is_better(
    value: float,
    metric: Metric,
    *,
    reached: bool,
) -> None:
    assert holds(value, goal=1.0, metric=metric) is reached


def test_a_lost_shape_is_said_in_the_table_and_in_the_verdict() -> None:
    results = results_of(*rounds_of("envoy", 100), *rounds_of("ours", 50))
    assert "| **0.50** [0.50..0.50] | >= 1.15 x envoy: missed |" in table(results, SHAPES)
    assert "1 missed" in verdict(results, SHAPES)
    assert "0.50 x envoy, the goal is >= 1.15 x envoy" in verdict(results, SHAPES)


def test_results_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    results = results_of(*rounds_of("ours", 1.5, 2.5))
    results.curves = {10: {"route_pod_us": 1.25}}
    results.growth = {"pods": {10: {"client_mib": 60.5}}}
    results.units = {"metrics/write": {1: 2.5}}
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_the_budget_speaks_of_things_that_are_measured() -> None:
    known: dict[str, Question] = {one.name: one for one in (*SHAPES, *QUESTIONS)}
    for name, entries in tomllib.loads(BUDGET.read_text()).items():
        assert set(entries) <= {metric.key for metric in known[name].metrics}, name


def test_every_name_is_used_once() -> None:
    names = [one.name for one in (*SHAPES, *QUESTIONS)]
    assert len(names) == len(set(names))
