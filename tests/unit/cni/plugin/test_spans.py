from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cni.plugin.spans import read_document, read_elements, read_members

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
layouts = st.sampled_from([None, 0, 2, "\t"])


@given(st.dictionaries(st.text(), json_values), layouts)
def test_each_member_is_the_text_between_its_ends(
    document: dict[str, object], indent: int | str | None
) -> None:
    text = f" {json.dumps(document, indent=indent)}\n"
    spans = read_document(text)
    assert {key: span.value for key, span in spans.items()} == document
    for span in spans.values():
        assert json.loads(text[span.start : span.end]) == span.value


@given(st.lists(json_values), layouts)
def test_each_element_is_the_text_between_its_ends(
    array: list[object], indent: int | str | None
) -> None:
    text = json.dumps(array, indent=indent)
    spans = read_elements(text, 0)
    assert [span.value for span in spans] == array
    assert [json.loads(text[span.start : span.end]) for span in spans] == array


@given(st.text(alphabet='{}[]",:0e-.\\u tfn\n') | st.text())
def test_any_text_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert {key: span.value for key, span in read_document(text).items()} == expected
    else:
        with pytest.raises(ValueError):  # noqa: PT011, that is what it declares
            read_document(text)


def test_of_members_with_one_name_the_last_counts() -> None:
    assert read_document('{"a": 1, "a": 2}')["a"].value == 2


def test_an_object_inside_a_text_may_have_something_after_it() -> None:
    assert read_members('[{"a": 1}, 2]', 1)["a"].value == 1


@pytest.mark.parametrize(
    "text", ["{} x", "[]", "", '{"a": NaN}', '{"a": -Infinity}', '{"a":1,}', "{1:2}"]
)
def test_what_go_would_refuse_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011, that is what it declares
        read_document(text)


def test_depth_has_a_limit() -> None:
    with pytest.raises(ValueError, match="too deeply"):
        read_document('{"a": ' + "[" * 100_000)
