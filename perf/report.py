"""Results as a table: Markdown for the documents, the same text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perf.results import Results, goals
from perf.shapes import Metric, Question
from perf.summary import Spread, holds, ratio, spread

OURS, REFERENCE = "ours", "envoy"
SMALL = 10


def table(results: Results, questions: Iterable[Question]) -> str:
    """Print medians with spreads, and each contender's ratio to Envoy in the same rounds."""
    compared = [name for name in results.contenders if name != "direct"]
    rivals = [name for name in compared if name != REFERENCE and REFERENCE in compared]
    head = ["what", "unit", *results.contenders, *(f"{name} / {REFERENCE}" for name in rivals)]
    rows = [[*head, "goal"], ["---"] * (len(head) + 1)]
    for question in results.measured(questions):
        rows += [_row(results, question, metric, rivals) for metric in question.metrics]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def about(results: Results) -> str:
    """Say in one paragraph what the numbers were measured on."""
    on = results.machine
    libraries = ", ".join(f"{name} {number}" for name, number in on["libraries"].items())
    return (
        f"Measured {on['when']} by `python -m perf`: {results.rounds} interleaved rounds of "
        f"{results.seconds:g} s each after {0.3:g} s of warm-up. {on['cpu']}, {on['cpus']} "
        f"virtual CPUs, {on['memory_gib']} GiB, {on['system']}, kernel {on['kernel']}, CPython "
        f"{on['python']}, {on['openssl']}, {libraries}. The machine is a shared one (load average "
        f"before the run: {on['load_average_before']})."
    )


def verdict(results: Results, questions: Iterable[Question]) -> str:
    """List what misses its goal, plainly."""
    lines, reached = [], 0
    for question in results.measured(questions):
        for metric in question.metrics:
            judged = judge(results, question, metric)
            if judged is None:
                continue
            reached += judged.reached
            if not judged.reached:
                lines.append(
                    f"- {question.title}, {metric.unit}: {judged.found}, the goal is {judged.goal}"
                )
    head = f"{reached} goals reached, {len(lines)} missed" + (":" if lines else ".")
    return "\n".join([head, "", *lines] if lines else [head])


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal and what was found, in words."""

    found: str
    goal: str
    reached: bool


def judge(results: Results, question: Question, metric: Metric) -> Judged | None:
    """Compare ours with the goal in the budget; None if there is none or nothing was measured.

    `goal` is a ratio to Envoy, `limit` a number of its own.
    """
    entry = goals().get(question.name, {}).get(metric.key, {})
    if "limit" in entry:
        found = spread(results.samples, question.name, OURS, metric.key)
        goal, unit = entry["limit"], ""
    else:
        found = ratio(results.samples, question.name, OURS, REFERENCE, metric)
        goal, unit = entry.get("goal", 0.0), f" x {REFERENCE}"
    if found is None or not goal:
        return None
    return Judged(
        found=f"{_number(found.middle)}{unit}",
        goal=f"{_sign(metric)} {goal:g}{unit}",
        reached=holds(found.middle, goal=goal, metric=metric),
    )


def _row(results: Results, question: Question, metric: Metric, rivals: list[str]) -> list[str]:
    samples, name = results.samples, question.name
    cells = [question.title if metric is question.metric else "", metric.unit]
    for contender in results.contenders:
        found = spread(samples, name, contender, metric.key)
        ends = [
            spread(samples, name, contender, f"{metric.key}_{end}") for end in ("client", "server")
        ]
        cells.append(_figures(found, ends))
    for rival in rivals:
        found = ratio(samples, name, rival, REFERENCE, metric)
        cells.append(
            f"**{found.middle:.2f}** [{found.least:.2f}..{found.most:.2f}]" if found else ""
        )
    judged = judge(results, question, metric)
    verdict = f"{judged.goal}: {'reached' if judged.reached else 'missed'}" if judged else ""
    return [*cells, verdict]


def _figures(found: Spread | None, ends: list[Spread | None]) -> str:
    if found is None:
        return ""
    shown = f"{_number(found.middle)} [{_number(found.least)}..{_number(found.most)}]"
    if all(ends):
        shown += f" ({' + '.join(_number(end.middle) for end in ends if end)})"
    return shown


def _number(value: float) -> str:
    return f"{value:.2f}" if value < SMALL else f"{value:.0f}"


def _sign(metric: Metric) -> str:
    return ">=" if metric.more_is_better else "<="
