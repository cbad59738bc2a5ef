from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from ztunnel.telemetry import exposition
from ztunnel.telemetry.exposition import (
    END,
    LABEL_CHARS_MAX,
    OVERFLOW,
    SERIES_MAX,
    Family,
    Kind,
    Peak,
    label_text,
    number,
)


def text(family: Family) -> str:
    return "".join(family.text()) + END


def test_a_counter_has_its_suffix_on_samples_only() -> None:
    family = Family("a_bytes", "Bytes", labels=("x",), unit="bytes")
    family.count("1").add(3)
    family.count("1").add()
    assert text(family) == (
        "# HELP a_bytes Bytes\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\n"
        'a_bytes_total{x="1"} 4\n# EOF\n'
    )


def test_a_family_without_series_is_left_out() -> None:
    assert text(Family("a", "b", labels=("x",))) == END


def test_a_gauge_goes_up_and_down() -> None:
    family = Family("a", "b", kind=Kind.GAUGE)
    family.count().add(2)
    family.count().add(-1)
    assert "\na 1\n" in text(family)
    family.count().set(0.5)
    assert "\na 0.5\n" in text(family)


def test_a_value_may_be_read_at_each_scrape() -> None:
    values = iter([1.0, 2.0])
    family = Family("a", "b", kind=Kind.GAUGE, read=lambda: next(values))
    assert "\na 1\n" in text(family)
    assert "\na 2\n" in text(family)


def test_a_peak_is_told_once_to_whoever_scrapes() -> None:
    peak = Peak()
    family = Family("a", "b", kind=Kind.GAUGE, read=peak.take)
    for value in (0.25, 0.5, 0.125):
        peak.observe(value)
    assert "\na 0.5\n" in text(family)
    assert "\na 0\n" in text(family)


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    family = Family("h", "b", kind=Kind.HISTOGRAM, labels=("x",), buckets=(0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        family.histogram("q").observe(value)
    assert text(family).split("\n")[2:7] == [
        'h_bucket{x="q",le="0.1"} 2',
        'h_bucket{x="q",le="1.0"} 3',
        'h_bucket{x="q",le="+Inf"} 4',
        'h_sum{x="q"} 7.65',
        'h_count{x="q"} 4',
    ]
    (parsed,) = parse(text(family))
    assert parsed.type == "histogram"


def test_a_histogram_without_labels_is_well_formed() -> None:
    family = Family("h", "b", kind=Kind.HISTOGRAM, buckets=(1.0,))
    family.histogram().observe(2)
    assert 'h_bucket{le="1.0"} 0\n' in text(family)
    assert list(parse(text(family)))


@given(st.lists(st.text(max_size=300), min_size=1, max_size=5))
def test_any_label_value_gives_a_text_that_parses(values: list[str]) -> None:
    family = Family("a", "b", labels=("x",))
    for value in values:
        family.count(value).add()
    (parsed,) = parse(text(family))
    assert sum(sample.value for sample in parsed.samples) == len(values)
    assert len(parsed.samples) == len({sample.labels["x"] for sample in parsed.samples})
    assert all(len(sample.labels["x"]) <= LABEL_CHARS_MAX for sample in parsed.samples)
    text(family).encode()


@given(st.text(alphabet='a"\\\nü{},=', max_size=20))
def test_a_label_value_survives_the_way_to_the_reader(value: str) -> None:
    family = Family("a", "b", labels=("x",))
    family.count(value).add()
    (parsed,) = parse(text(family))
    assert parsed.samples[0].labels["x"] == value


def test_series_beyond_the_cap_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "SERIES_MAX", 2)
    family = Family("a", "b", labels=("x", "y"))
    for name in "pqrs":
        family.count(name, name).add()
    assert family.overflowed == 2
    assert f'a_total{{x="{OVERFLOW}",y="{OVERFLOW}"}} 2\n' in text(family)
    family.count("p", "p").add()
    assert 'a_total{x="p",y="p"} 2\n' in text(family)


def test_the_cap_is_sane() -> None:
    assert 1000 <= SERIES_MAX <= 100_000


def test_labels_without_names_have_no_braces() -> None:
    assert label_text((), ()) == ""


@pytest.mark.parametrize(
    ("value", "shown"), [(3.0, "3"), (0.25, "0.25"), (10**15, "1000000000000000")]
)
def test_a_number(value: float, shown: str) -> None:
    assert number(value) == shown
