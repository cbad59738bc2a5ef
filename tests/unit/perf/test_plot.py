"""Plots are well-formed pictures that show what they are given."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from perf.plot import BAD, GOOD, Bar, bars, lines
from perf.summary import Spread

SVG = "{http://www.w3.org/2000/svg}"


def test_a_bar_is_as_long_as_its_ratio_is_far_from_1() -> None:
    rows = [
        Bar("double <&>", Spread(2, 1.9, 2.1), is_better=True),
        Bar("half", Spread(0.5, 0.5, 0.5), is_better=False),
    ]
    root = ET.fromstring(bars("ratios", rows))
    drawn = [one for one in root.iter(f"{SVG}rect") if one.get("fill") in (GOOD, BAD)]
    assert [one.get("fill") for one in drawn] == [GOOD, BAD]
    assert drawn[0].get("width") == drawn[1].get("width")
    left, right = float(drawn[1].attrib["x"]), float(drawn[0].attrib["x"])
    assert right - left == pytest.approx(float(drawn[1].attrib["width"]), abs=0.2)
    assert "double <&>" in [one.text for one in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e9])
def test_a_ratio_off_the_scale_stays_in_the_picture(value: float) -> None:
    root = ET.fromstring(bars("", [Bar("far", Spread(value, value, value), is_better=True)]))
    width = float(root.attrib["width"])
    for one in root.iter(f"{SVG}rect"):
        right = float(one.attrib.get("x", 0)) + float(one.attrib["width"])
        assert 0 <= right <= width


def test_each_curve_is_one_line_through_all_its_points() -> None:
    picture = lines("cost", {"flat": {1: 5, 100: 5}, "rising": {1: 1, 10: 10, 100: 100}})
    found = [one.attrib["points"].split() for one in ET.fromstring(picture).iter(f"{SVG}polyline")]
    assert [len(points) for points in found] == [2, 3]
    flat = [point.split(",")[1] for point in found[0]]
    assert flat[0] == flat[1]
