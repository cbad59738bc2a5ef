"""The page of measured numbers: one part for each OpenSSL, all of it generated."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.documents import BEGIN, END, PAGE, keep, write_documents
from perf.growth import UNITS as GROWTH_UNITS
from perf.results import Results, machine
from perf.rounds import Sample
from perf.shapes import SHAPES

SHAPE = next(shape for shape in SHAPES if shape.name == "connect-16")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / PAGE).write_text(f"What we do.\n\n{BEGIN}\nold numbers\n{END}\n\nWhy.\n")
    return tmp_path


def results_on(openssl: str, ours: float) -> Results:
    samples = [
        Sample(SHAPE.name, "envoy", 0, {"per_s": 100.0}),
        Sample(SHAPE.name, "ours", 0, {"per_s": ours}),
    ]
    on = {**machine(0.0), "openssl": openssl}
    return Results(["envoy", "ours"], rounds=1, seconds=1, samples=samples, machine=on)


def test_each_openssl_has_a_table_and_the_text_around_stays(docs: Path) -> None:
    keep(results_on("OpenSSL 3.5.1 1 Jul 2025", 200), docs)
    keep(results_on("OpenSSL 3.0.15 3 Sep 2024", 90), docs)
    write_documents(SHAPES, docs)
    page = (docs / PAGE).read_text()
    assert page.startswith(f"What we do.\n\n{BEGIN}")
    assert page.endswith(f"{END}\n\nWhy.\n")
    assert "old numbers" not in page
    assert page.index("## On OpenSSL 3.0.15") < page.index("**0.90**")
    assert page.index("**0.90**") < page.index("## On OpenSSL 3.5.1") < page.index("**2.00**")
    for drawn in ("ratios", "cpu"):
        assert (docs / f"performance/openssl-3.5/{drawn}.svg").exists()


def test_a_new_run_takes_the_place_of_the_last_one_on_the_same_openssl(docs: Path) -> None:
    keep(results_on("OpenSSL 3.5.1 1 Jul 2025", 200), docs)
    keep(results_on("OpenSSL 3.5.7 9 Jun 2026", 300), docs)
    write_documents(SHAPES, docs)
    page = (docs / PAGE).read_text()
    assert "**3.00**" in page
    assert "**2.00**" not in page


def test_cost_curves_are_drawn_and_told_for_the_sizes_that_each_has(docs: Path) -> None:
    results = results_on("OpenSSL 3.5.7 9 Jun 2026", 300)
    results.growth = {
        what: {size: dict.fromkeys(GROWTH_UNITS, float(size)) for size in sizes}
        for what, sizes in (("workloads", (1, 1000)), ("pods", (1, 10)))
    }
    results.units = {"vip_match/exact-hit": {1: 0.25, 1000: 0.5}}
    keep(results, docs)
    write_documents(SHAPES, docs)
    page = (docs / PAGE).read_text()
    assert "| vip_match/exact-hit | 0.25 | 0.50 |" in page
    unit = GROWTH_UNITS["client_mib"]
    assert f"| workloads: {unit} | 1.00 |  | 1000.00 |" in page
    assert f"| pods: {unit} | 1.00 | 10.00 |  |" in page
    drawn = [path.name for path in docs.glob("performance/openssl-3.5/growth-*.svg")]
    assert len(drawn) == len(GROWTH_UNITS)
    assert all(f"(performance/openssl-3.5/{name})" in page for name in drawn)


def test_a_page_without_its_marks_is_left_alone(docs: Path) -> None:
    (docs / PAGE).write_text("What we do.\n")
    keep(results_on("OpenSSL 3.5.1 1 Jul 2025", 200), docs)
    with pytest.raises(ValueError, match="lost the marks"):
        write_documents(SHAPES, docs)
    assert (docs / PAGE).read_text() == "What we do.\n"
