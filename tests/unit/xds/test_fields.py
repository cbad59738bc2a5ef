from __future__ import annotations

from enum import StrEnum

import pytest
import yaml

from ztunnel.xds.fields import PROBLEMS_MAX, Field, Problems, integer_up_to


class Colour(StrEnum):
    RED = "Red"
    BLUE = "Blue"


def read(text: str, path: str = "") -> tuple[Field, Problems]:
    problems = Problems("lab.yaml")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None
    return Field(node, path, problems), problems


@pytest.mark.parametrize(
    ("text", "value", "problem"),
    [
        ("plain", "plain", ""),
        ("'80'", "80", ""),
        ("80", "80", ""),
        ("yes", "yes", ""),
        ("[a]", None, "lab.yaml: x, line 1: expected text, found a list"),
        ("{a: b}", None, "lab.yaml: x, line 1: expected text, found a map"),
        ("~", None, "lab.yaml: x, line 1: expected text, found nothing"),
    ],
)
def test_a_text_is_what_is_written(text: str, value: str | None, problem: str) -> None:
    field, problems = read(text, "x")
    assert field.text() == value
    assert str(problems) == problem


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("80", 80), ("65535", 65535), ("'80'", 80), ("65536", None), ("-1", None)],
)
def test_a_number_has_bounds(text: str, value: int | None) -> None:
    field, problems = read(text)
    assert field.parse(integer_up_to(65535)) == value
    assert bool(problems.lines) == (value is None)


@pytest.mark.parametrize("text", ["0x50", "8_0", "1e3", "9" * 5000, "٣", "3.0"])
def test_other_ways_to_write_numbers_are_refused(text: str) -> None:
    field, problems = read(text)
    assert field.parse(integer_up_to(65535)) is None
    assert "is not a number from 0 to 65535" in str(problems)


def test_a_choice_says_what_there_is() -> None:
    assert read("Red")[0].choice(Colour) is Colour.RED
    field, problems = read("red")
    assert field.choice(Colour) is None
    assert str(problems) == "lab.yaml: document, line 1: 'red' is not known; use one of Red, Blue"
    field, problems = read("[Red]")
    assert field.choice(Colour) is None
    assert len(problems.lines) == 1


def test_items_and_entries_know_their_place() -> None:
    field, problems = read("a:\n  - 1\n  - x: [y]\n    z: [2, []]\n")
    (_, listed) = next(iter(field.entries()))
    one, two = listed.items()
    assert (one.path, two.path) == ("a[0]", "a[1]")
    entries = {str(key.node.value): value for key, value in two.entries()}
    assert entries["z"].path == "a[1].z"
    assert entries["z"].each(lambda item: item.parse(integer_up_to(9))) == (2,)
    assert str(problems) == "lab.yaml: a[1].z[1], line 4: expected text, found a list"


def test_nothing_is_an_empty_list_and_an_empty_map() -> None:
    field, problems = read("~")
    assert not list(field.items())
    assert not list(field.entries())
    assert not problems.lines


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("text", "expected a map, found a single value"),
        ("{a: 1, a: 2}", "'a' is written twice; keep one"),
        ("{[x]: 1, a: 2}", "expected text, found a list"),
        ("{a: 2, colour: 3}", "unknown key `colour`; did you mean `color`?"),
        ("{a: 2, zzz: 3}", "unknown key `zzz`; known are a, color"),
        ("{color: 1}", "`a` is missing"),
    ],
)
def test_an_object_has_known_keys(text: str, problem: str) -> None:
    field, problems = read(text)
    field.object(frozenset({"a", "color"}), required=("a",) if "text" not in text else ())
    assert str(problems) == f"lab.yaml: document, line 1: {problem}"


def test_a_list_in_place_of_one_thing_is_a_problem() -> None:
    field, problems = read("{a: text}")
    obj = field.object(frozenset({"a"}))
    assert obj.each("a", Field.text) == ()
    assert str(problems) == "lab.yaml: a, line 1: expected a list, found a single value"


def test_absent_null_and_wrong_fields_read_as_their_default() -> None:
    field, problems = read("{b: ~, c: maybe}")
    obj = field.object(frozenset("abc"))
    assert obj.text("a") == obj.text("b") == ""
    assert obj.boolean("a") is obj.boolean("c") is False
    assert obj.choice("b", Colour, Colour.BLUE) is Colour.BLUE
    assert obj.maybe("a", Field.text) is None
    assert str(problems) == "lab.yaml: c, line 1: 'maybe' is neither true nor false"


def test_true_is_true() -> None:
    obj = read("{a: true}")[0].object(frozenset("a"))
    assert obj.boolean("a") is True


def test_no_more_problems_than_a_person_mends_in_one_go() -> None:
    field, problems = read(str(["x"] * (PROBLEMS_MAX + 3)))
    field.each(lambda item: item.parse(integer_up_to(9)))
    assert len(problems.lines) == PROBLEMS_MAX
    assert str(problems).endswith("\nlab.yaml: and 3 more")
