from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from cni.agent.selectors import DEFAULT_ENABLEMENTS, Enablement, parse_enablements

CHART = """
- podSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
- podSelector:
    matchExpressions:
    - {key: istio.io/dataplane-mode, operator: NotIn, values: [none]}
  namespaceSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
"""


def test_the_default_is_what_the_reference_writes_into_its_chart() -> None:
    assert parse_enablements(CHART) == DEFAULT_ENABLEMENTS


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_an_empty_list_lets_nobody_in(text: str) -> None:
    assert parse_enablements(text) == ()


@pytest.mark.parametrize("text", ["- {}", "- {podSelector: {}}", "- {namespaceSelector: null}"])
def test_an_empty_selector_matches_everything(text: str) -> None:
    assert parse_enablements(text) == (Enablement(),)
    assert Enablement().matches({}, {"a": "b"})


@pytest.mark.parametrize(
    ("expression", "labels", "wanted"),
    [
        ("{key: a, operator: In, values: [x, y]}", {"a": "y"}, True),
        ("{key: a, operator: In, values: [x]}", {"a": "y"}, False),
        ("{key: a, operator: In, values: [x]}", {}, False),
        ("{key: a, operator: NotIn, values: [x]}", {}, True),
        ("{key: a, operator: NotIn, values: [x]}", {"a": "x"}, False),
        ("{key: a, operator: NotIn, values: [x]}", {"a": "y"}, True),
        ("{key: a, operator: Exists}", {"a": ""}, True),
        ("{key: a, operator: Exists}", {}, False),
        ("{key: a, operator: DoesNotExist}", {}, True),
        ("{key: a, operator: DoesNotExist}", {"a": "x"}, False),
    ],
)
def test_operators_mean_what_they_mean_in_kubernetes(
    expression: str, labels: dict[str, str], wanted: bool
) -> None:
    (enablement,) = parse_enablements(f"- podSelector: {{matchExpressions: [{expression}]}}")
    assert enablement.matches(labels, {}) is wanted


def test_all_requirements_must_hold() -> None:
    (enablement,) = parse_enablements("- podSelector: {matchLabels: {a: x, b: y}}")
    assert enablement.matches({"a": "x", "b": "y"}, {})
    assert not enablement.matches({"a": "x"}, {})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not YAML"),
        ("a: b", "not a list"),
        ("- 1", "not a mapping"),
        ("- {podselector: {}}", "unknown fields: podselector"),
        ("- {podSelector: {matchlabels: {}}}", "unknown fields"),
        ("- {podSelector: {matchLabels: {a: 1}}}", "not a text"),
        ("- {podSelector: {matchExpressions: [{key: a, operator: Is}]}}", "Is"),
        ("- {podSelector: {matchExpressions: [{key: a, operator: In}]}}", "In with 0"),
        (
            "- {podSelector: {matchExpressions: [{key: a, operator: Exists, values: [x]}]}}",
            "Exists with 1",
        ),
        ("- {podSelector: {matchExpressions: [{key: '', operator: Exists}]}}", "without a key"),
    ],
)
def test_what_we_do_not_understand_is_an_error(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_enablements(text)


@given(st.text(max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        parse_enablements(text)
    except ValueError:
        return
