"""Medians, spreads and ratios of what the rounds gave; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from perf.rounds import Sample
from perf.shapes import Metric


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some numbers, and their ends."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """Sum numbers up; None if there are none."""
        known = list(numbers)
        return cls(median(known), min(known), max(known)) if known else None


def spread(samples: Iterable[Sample], shape: str, contender: str, key: str) -> Spread | None:
    """Sum up one value of one contender over the rounds of a shape."""
    return Spread.of(_by_round(samples, shape, contender, key).values())


def ratio(
    samples: Iterable[Sample], shape: str, contender: str, other: str, metric: Metric
) -> Spread | None:
    """Compare within each round, then take the middle; the spread shows how sure that is.

    It is `contender` over `other` also where less is better, so that "0.9 x" of a cost is good.
    """
    known = list(samples)
    mine = _by_round(known, shape, contender, metric.key)
    theirs = _by_round(known, shape, other, metric.key)
    return Spread.of(mine[n] / theirs[n] for n in mine.keys() & theirs.keys() if theirs[n])


def holds(value: float, *, goal: float, metric: Metric) -> bool:
    """Whether a ratio reaches its goal."""
    return value >= goal if metric.more_is_better else value <= goal


def _by_round(samples: Iterable[Sample], shape: str, contender: str, key: str) -> dict[int, float]:
    return {
        sample.number: sample.values[key]
        for sample in samples
        if (sample.shape, sample.contender) == (shape, contender) and key in sample.values
    }
