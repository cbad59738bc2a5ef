from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from ztunnel.errors import ResourceError
from ztunnel.xds.document import DEPTH_MAX, EVENTS_PER_STEP, compose, finish


def shape(node: yaml.Node | None) -> Any:
    """What counts of a node: tag, line and content."""
    if node is None:
        return None
    content: Any = node.value
    if isinstance(node, yaml.SequenceNode):
        content = [shape(item) for item in node.value]
    elif isinstance(node, yaml.MappingNode):
        content = [(shape(key), shape(value)) for key, value in node.value]
    return type(node).__name__, node.tag, node.start_mark.line, content


def both(text: str) -> tuple[Any, Any]:
    """Our nodes, and those of the library's own composer."""
    theirs: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return shape(finish(compose(text, source="x"))), shape(theirs)


def problem(text: str) -> str:
    with pytest.raises(ResourceError) as caught:
        finish(compose(text, source="lab.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a: 1\nb: [true, ~, 'true', 1.5]\n? c\n: {d: !Exact x, !Key k: !Map {}}",
        "- &one {a: 1}\n- *one\n- ! 5\n- !!str 5\n- |\n  text\n",
        '{"a": {"b": []}}',
        "- - - 1\n    - 2\n  - 3\n",
    ],
)
def test_the_nodes_are_those_of_the_library(text: str) -> None:
    ours, theirs = both(text)
    assert ours == theirs


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=30,
)


@given(value=json, is_flow=st.booleans())
def test_they_are_so_for_whatever_yaml_writes(value: Any, *, is_flow: bool) -> None:
    ours, theirs = both(yaml.safe_dump(value, default_flow_style=is_flow))
    assert ours == theirs


@given(text=st.text(alphabet=" \n-:[]{}&*!?|>'\"ab#%@~,\t", max_size=40))
def test_garbage_raises_the_declared_error_only(text: str) -> None:
    try:
        finish(compose(text, source="x"))
    except ResourceError:
        return


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: ]", "lab.yaml, line 2: not YAML: "),
        ("a: 1\n---\nb: 1", "lab.yaml, line 2: not YAML: more than one document"),
        ("a:\n  *b", "lab.yaml, line 2: not YAML: the alias 'b' means nothing complete"),
        ("&a [\n*a]", "lab.yaml, line 2: not YAML: the alias 'a' means nothing complete"),
        ("\n" + "[" * (DEPTH_MAX + 1), f"lab.yaml, line 2: nested over {DEPTH_MAX} deep"),
        ("[" * 100_000, f"lab.yaml, line 1: nested over {DEPTH_MAX} deep"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


def test_a_large_document_rests_often() -> None:
    steps = compose("\n".join(["- 1"] * 10 * EVENTS_PER_STEP), source="x")
    assert len(list(steps)) == 10
