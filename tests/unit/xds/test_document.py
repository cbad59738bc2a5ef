from __future__ import annotations

import weakref
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


def content(node: yaml.Node) -> Any:
    """The content alone, as Python has it."""
    if isinstance(node, yaml.SequenceNode):
        return [content(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {content(key): content(value) for key, value in node.value}
    return node.value


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


TAKEN = """
a:
- {b: [1, 2]}
- &two 2
- *two
c: [[3], []]
d: {e: [4]}
? [5, 6]
: [7]
"""


def test_elements_of_the_lists_of_the_root_can_be_taken_one_by_one() -> None:
    taken: list[tuple[Any, Any]] = []

    def take(key: yaml.Node, element: yaml.Node) -> None:
        taken.append((content(key), content(element)))

    root = finish(compose(TAKEN, source="x", take=take))
    assert taken == [
        ("a", {"b": ["1", "2"]}),
        ("a", "2"),
        ("a", "2"),
        ("c", ["3"]),
        ("c", []),
        (["5", "6"], "7"),
    ]
    assert root is not None
    assert [(content(key), content(value)) for key, value in root.value] == [
        ("a", []),
        ("c", []),
        ("d", {"e": ["4"]}),
        (["5", "6"], []),
    ]


@pytest.mark.parametrize("text", ["1", "- 1\n- [2]", "{a: {b: [1]}}", ""])
def test_there_are_none_to_take_elsewhere(text: str) -> None:
    def take(key: yaml.Node, element: yaml.Node) -> None:
        raise AssertionError(key, element)

    assert shape(finish(compose(text, source="x", take=take))) == shape(
        yaml.compose(text, Loader=yaml.SafeLoader)
    )


def test_a_list_that_was_taken_apart_cannot_be_meant_again() -> None:
    with pytest.raises(ResourceError, match="the alias 'l' means nothing complete"):
        finish(compose("a: &l [1]\nb: *l", source="x", take=lambda *_: None))


def test_of_what_is_taken_never_more_than_one_is_there() -> None:
    most = 0
    alive: weakref.WeakSet[yaml.Node] = weakref.WeakSet()

    def take(_: yaml.Node, element: yaml.Node) -> None:
        nonlocal most
        alive.add(element)
        most = max(most, len(alive))

    finish(compose("a:\n" + "- {b: [1]}\n" * 100, source="x", take=take))
    assert most <= 2, "the one that is taken, and the one before, which its maker still holds"
