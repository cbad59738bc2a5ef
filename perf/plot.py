"""Two kinds of plot as SVG: bars of ratios around 1, and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from perf.summary import Spread

GOOD, BAD, INK, FAINT = "#2a7d4f", "#b5482f", "#24292f", "#c9ced4"
COLOURS = ("#2a6fb5", "#b5482f", "#2a7d4f", "#8250a8", "#a8741a", "#3a8f95")
FONT = "font-family='sans-serif' font-size='12'"
WIDTH, LABELS, ROW, MARGIN = 860, 330, 24, 30
OCTAVES = 2.5  # how far the bars' axis goes to either side of 1, in powers of two


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio with its spread; `is_better` chooses the colour."""

    label: str
    found: Spread
    is_better: bool


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Draw ratios from 1 on, to the right if above, on a logarithmic axis."""
    height = MARGIN * 2 + ROW * len(rows)
    parts = [_text(LABELS, 18, title, weight="bold")]
    for power in (-2, -1, 0, 1, 2):
        x = _ratio_x(2.0**power)
        colour = INK if power == 0 else FAINT
        parts.append(_line(x, MARGIN, x, height - MARGIN, colour))
        parts.append(_text(x, height - 10, f"{2.0**power:g} x", anchor="middle"))
    for number, bar in enumerate(rows):
        y = MARGIN + ROW * number + ROW / 2
        one, x = _ratio_x(1), _ratio_x(bar.found.middle)
        colour = GOOD if bar.is_better else BAD
        parts.append(_text(LABELS - 8, y + 4, bar.label, anchor="end"))
        parts.append(
            f"<rect x='{min(one, x):.1f}' y='{y - 7:.1f}' width='{max(abs(x - one), 1):.1f}' "
            f"height='14' fill='{colour}' fill-opacity='0.75'/>"
        )
        low, high = _ratio_x(bar.found.least), _ratio_x(bar.found.most)
        parts.append(_line(low, y, high, y, INK))
        parts.append(_text(WIDTH - 4, y + 4, f"{bar.found.middle:.2f}", anchor="end"))
    return _svg(WIDTH, height, parts)


def lines(title: str, curves: Mapping[str, Mapping[int, float]]) -> str:
    """Draw one curve for each name, over sizes on a logarithmic axis; both axes begin at 0 or 1."""
    left, top, bottom, high, right = 60, 40, 300, 420, 500
    sizes = sorted({size for points in curves.values() for size in points})
    most = max(value for points in curves.values() for value in points.values()) * 1.1
    span = math.log10(max(sizes)) or 1
    parts = [_text(left, 20, title, weight="bold")]

    def place(size: int, value: float) -> tuple[float, float]:
        return left + math.log10(size) / span * (right - left), bottom - value / most * (
            bottom - top
        )

    for size in sizes:
        x, _ = place(size, 0)
        parts += [
            _line(x, top, x, bottom, FAINT),
            _text(x, bottom + 16, f"{size}", anchor="middle"),
        ]
    for step in range(5):
        value = most * step / 4
        _, y = place(1, value)
        parts += [
            _line(left, y, right, y, FAINT),
            _text(left - 6, y + 4, f"{value:.0f}", anchor="end"),
        ]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (place(*one) for one in sorted(points.items()))
        )
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts.append(_text(right + 14, top + 18 * number + 10, name, colour=colour))
    return _svg(WIDTH, high - 90, parts)


def _ratio_x(value: float) -> float:
    octave = max(-OCTAVES, min(OCTAVES, math.log2(value))) if value > 0 else -OCTAVES
    middle = (LABELS + WIDTH - 50) / 2
    return middle + octave / OCTAVES * (WIDTH - 50 - LABELS) / 2


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'/>"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    colour: str = INK,
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} text-anchor='{anchor}' font-weight='{weight}' "
        f"fill='{colour}'>{escape(text)}</text>"
    )


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>"
    )
    return "\n".join(
        [head, f"<rect width='{width}' height='{height}' fill='white'/>", *parts, "</svg>", ""]
    )
