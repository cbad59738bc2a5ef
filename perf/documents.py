"""Results into the documents: the measured part of docs/performance.md, its plots and the JSON.

Nobody writes numbers there by hand: what stands between the two marks is replaced as a whole. Each
version of OpenSSL that was measured on has a part of its own, and a folder for its results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from perf.curves import UNITS, Point
from perf.growth import UNITS as GROWTH_UNITS
from perf.plot import Bar, bars, lines
from perf.report import OURS, REFERENCE, about, table, verdict
from perf.results import Results
from perf.shapes import S_PER_GB, US_EACH, Metric, Question
from perf.summary import holds, ratio

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FOLDER = "performance.md", "performance"
RESULTS = "results.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COSTS = (S_PER_GB, US_EACH)


def keep(results: Results, docs: Path = DOCS) -> None:
    """Keep a run's results in the place of the last ones on the same OpenSSL."""
    results.write(docs / FOLDER / edition(results) / RESULTS)


def edition(results: Results) -> str:
    """Name what a run was measured on, as far as it decides about speed: "openssl-3.5"."""
    name, number = results.machine["openssl"].split()[:2]
    return f"{name.lower()}-{'.'.join(number.split('.')[:2])}"


def write_documents(questions: Sequence[Question], docs: Path = DOCS) -> None:
    """Draw plots of all results that are kept, and replace the measured part of the page.

    Raises:
        ValueError: the page has lost its marks.
    """
    page = docs / PAGE
    kept = sorted(docs.glob(f"{FOLDER}/*/{RESULTS}"))
    parts = [_part(Results.read(path), path.parent, questions) for path in kept]
    before, mark, rest = page.read_text().partition(BEGIN)
    _, other, after = rest.partition(END)
    if not (mark and other):
        raise ValueError(f"{page} has lost the marks around its measured part")
    page.write_text(before + "\n\n".join([BEGIN, *parts, END]) + after)


def _part(results: Results, folder: Path, questions: Sequence[Question]) -> str:
    (folder / "ratios.svg").write_text(_ratios(results, questions))
    (folder / "cpu.svg").write_text(_costs(results, questions))
    place = f"{FOLDER}/{folder.name}"
    part = [
        f"## On {' '.join(results.machine['openssl'].split()[:2])}",
        about(results),
        f"![What counts, ours over Envoy's]({place}/ratios.svg)",
        f"![CPU for the same work, ours over Envoy's]({place}/cpu.svg)",
        table(results, questions),
        "### Against the goals\n\n" + verdict(results, questions),
    ]
    if results.curves:
        (folder / "curves.svg").write_text(_curves(results.curves))
        part += [
            f"### What one more costs\n\n![Cost curves]({place}/curves.svg)",
            _size_table(
                {
                    unit: {size: point[key] for size, point in results.curves.items()}
                    for key, unit in UNITS.items()
                }
            ),
        ]
    if results.growth:
        part += _growth(results.growth, folder, place)
    if results.units:
        part += ["### The reference's micro-benchmarks, us", _size_table(results.units)]
    return "\n\n".join(part)


def _growth(growth: dict[str, dict[int, Point]], folder: Path, place: str) -> list[str]:
    """Draw one plot for each value, with a line for each thing of which there may be much."""
    parts = ["### Whole proxies that know or hold much"]
    for key, unit in GROWTH_UNITS.items():
        drawn = {
            what: {size: point[key] for size, point in points.items()}
            for what, points in growth.items()
        }
        name = f"growth-{key.replace('_', '-')}.svg"
        (folder / name).write_text(lines(f"{unit}, against how many there are", drawn))
        parts.append(f"![{unit}]({place}/{name})")
    rows = {
        f"{what}: {unit}": {size: point[key] for size, point in points.items()}
        for what, points in growth.items()
        for key, unit in GROWTH_UNITS.items()
    }
    return [*parts, _size_table(rows)]


def _ratios(results: Results, questions: Sequence[Question]) -> str:
    rows = [
        bar
        for question in results.measured(questions)
        if (bar := _bar(results, question, question.metric)) is not None
    ]
    return bars("ours over Envoy in the same rounds; green is better, the line is the spread", rows)


def _costs(results: Results, questions: Sequence[Question]) -> str:
    rows = [
        bar
        for question in results.measured(questions)
        for metric in question.more
        if metric in COSTS and (bar := _bar(results, question, metric)) is not None
    ]
    return bars("CPU of both proxies for the same work, ours over Envoy's; less is better", rows)


def _bar(results: Results, question: Question, metric: Metric) -> Bar | None:
    found = ratio(results.samples, question.name, OURS, REFERENCE, metric)
    if found is None:
        return None
    better = holds(found.middle, goal=1.0, metric=metric)
    return Bar(f"{question.name}, {metric.unit}", found, better)


def _curves(curves: dict[int, Point]) -> str:
    named = {
        unit: {size: point[key] for size, point in curves.items()}
        for key, unit in UNITS.items()
        if key.endswith("_us") and key != "add_policy_us"
    }
    return lines("cost against the number of workloads (or policies) known", named)


def _size_table(rows: Mapping[str, Mapping[int, float]]) -> str:
    """Print one row for each name, and a column for each size that any of them has."""
    sizes = sorted({size for row in rows.values() for size in row})
    table = [["", *(f"{size:,}" for size in sizes)], ["---"] * (len(sizes) + 1)]
    table += [
        [name, *(f"{row[size]:.2f}" if size in row else "" for size in sizes)]
        for name, row in rows.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
