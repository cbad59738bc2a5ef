r"""Metric families and their OpenMetrics text (OpenMetrics 1.0).

Our own small registry, because traffic needs what prometheus-client has not: series that can be
forgotten, a cap on their number, and a text that is made in slices so that a scrape of a hundred
thousand series does not stop the event loop. Label values are escaped (`\\`, `\"`, `\n`) and
cut to a sane length; many of them come from a peer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import StrEnum

LABEL_CHARS_MAX = 256  # a name in Kubernetes has 253 at most, a SPIFFE URI seldom more
SERIES_MAX = 10_000  # of one family whose labels a peer can influence
OVERFLOW = "overflow"  # the label value that stands for everything beyond the cap
END = "# EOF\n"

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Kind(StrEnum):
    """What a family counts."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


def clean(text: str) -> str:
    """Cut one label value to length; what UTF-8 cannot say becomes a question mark."""
    text = text[:LABEL_CHARS_MAX]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def label_value(text: str) -> str:
    """Cut and escape one label value."""
    return clean(text).translate(_ESCAPES)


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """Print labels with their braces, or nothing if there are none."""
    pairs = zip(names, values, strict=True)
    shown = ",".join(f'{name}="{label_value(value)}"' for name, value in pairs)
    return f"{{{shown}}}" if shown else ""


class Count:
    """One counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float = 1) -> None:
        """Count `amount` more, or for a gauge less if it is below zero."""
        self.value += amount

    def set(self, value: float) -> None:
        """Put a gauge to `value`."""
        self.value = value

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """Print the samples of this series."""
        yield f"{name}{labels} {number(self.value)}\n"


class Peak:
    """The highest of what was observed since it was last taken."""

    __slots__ = ("_highest",)

    def __init__(self) -> None:
        self._highest = 0.0

    def observe(self, value: float) -> None:
        """Note one observation."""
        self._highest = max(self._highest, value)

    def take(self) -> float:
        """Give the highest, and begin anew at 0."""
        highest, self._highest = self._highest, 0.0
        return highest


class Histogram:
    """One histogram; bounds are upper limits, inclusive, without +Inf."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """Print the samples of this series."""
        inner = f"{labels[1:-1]}," if labels else ""
        seen = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            limit = "+Inf" if bound == float("inf") else str(float(bound))
            yield f'{name}_bucket{{{inner}le="{limit}"}} {seen}\n'
        yield f"{name}_sum{labels} {number(self.total)}\n"
        yield f"{name}_count{labels} {seen}\n"


def number(value: float) -> str:
    """Print a sample's value; whole numbers without a fraction."""
    return str(int(value)) if value == int(value) else repr(float(value))


class Family:
    """A metric with its series by label values."""

    def __init__(
        self, name: str, description: str, *, kind: Kind = Kind.COUNTER,
        labels: tuple[str, ...] = (), unit: str = "", buckets: tuple[float, ...] = (),
        read: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """Declare a metric; `name` is without `_total`; `read` gives its value at each scrape."""
        self.name = name
        self.labels = labels
        self.overflowed = 0  # times a new series was refused
        self._head = f"# HELP {name} {description}\n# TYPE {name} {kind}\n"
        self._head += f"# UNIT {name} {unit}\n" if unit else ""
        self._sample = f"{name}_total" if kind is Kind.COUNTER else name
        self._buckets = buckets
        self._read = read
        self._counts: dict[tuple[str, ...], Count] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def count(self, *values: str) -> Count:
        """Give the counter or gauge with these label values."""
        found = self._counts.get(values)
        if found is None:
            assert len(values) == len(self.labels)
            values = self._allowed(values, self._counts)
            found = self._counts.setdefault(values, Count())
        return found

    def histogram(self, *values: str) -> Histogram:
        """Give the histogram with these label values."""
        found = self._histograms.get(values)
        if found is None:
            assert len(values) == len(self.labels)
            values = self._allowed(values, self._histograms)
            found = self._histograms.setdefault(values, Histogram(self._buckets))
        return found

    def text(self) -> Iterator[str]:
        """Print the family in pieces; nothing while it has no series."""
        if self._read is not None:
            self.count().value = self._read()
        series: list[tuple[tuple[str, ...], Count | Histogram]]
        series = [*self._counts.items(), *self._histograms.items()]
        if series:
            yield self._head
        for values, one in series:
            yield from one.samples(self._sample, label_text(self.labels, values))

    def _allowed(self, values: tuple[str, ...], existing: Collection[object]) -> tuple[str, ...]:
        values = tuple(clean(value) for value in values)
        if values in existing or len(existing) < SERIES_MAX:
            return values
        self.overflowed += 1
        return (OVERFLOW,) * len(values)
