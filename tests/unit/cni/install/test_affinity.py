from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from cni.install.affinity import wants_node

NODE = {"metadata": {"name": "node-1", "labels": {"zone": "a", "cores": "8", "empty": ""}}}


def a_daemonset(terms: object = None, selector: object = None) -> dict[str, object]:
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = {} if terms is None else {"nodeAffinity": {required: {"nodeSelectorTerms": terms}}}
    pod = {"affinity": affinity, "nodeSelector": selector}
    return {"spec": {"template": {"spec": pod}}}


def expression(key: str, operator: str, *values: str) -> dict[str, object]:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        (None, True),
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"disk": "ssd"}, False),
        ({"zone": "a", "cores": "4"}, False),
    ],
)
def test_the_node_selector_must_hold(selector: object, *, wanted: bool) -> None:
    assert wants_node(a_daemonset(selector=selector), NODE) is wanted


@pytest.mark.parametrize(
    ("terms", "wanted"),
    [
        pytest.param([expression("zone", "In", "b", "a")], True, id="in"),
        pytest.param([expression("zone", "In", "b")], False, id="not in"),
        pytest.param([expression("zone", "NotIn", "b")], True, id="NotIn"),
        pytest.param([expression("disk", "NotIn", "b")], True, id="NotIn, no label"),
        pytest.param([expression("empty", "Exists")], True, id="exists"),
        pytest.param([expression("disk", "Exists")], False, id="exists not"),
        pytest.param([expression("disk", "DoesNotExist")], True, id="does not exist"),
        pytest.param([expression("cores", "Gt", "7")], True, id="greater"),
        pytest.param([expression("cores", "Gt", "8")], False, id="not greater"),
        pytest.param([expression("cores", "Lt", "9")], True, id="less"),
        pytest.param([expression("zone", "Lt", "9")], False, id="not a number"),
        pytest.param([expression("cores", "Gt")], False, id="no number"),
        pytest.param([expression("zone", "Like", "a")], False, id="unknown operator"),
        pytest.param([], False, id="no term"),
        pytest.param([{}], False, id="a term that demands nothing"),
        pytest.param([{}, expression("zone", "In", "a")], True, id="one of several"),
    ],
)
def test_one_required_term_must_hold(terms: object, *, wanted: bool) -> None:
    assert wants_node(a_daemonset(terms), NODE) is wanted


def test_a_term_may_name_the_node_and_then_all_of_it_must_hold() -> None:
    field = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]}
    assert wants_node(a_daemonset([field]), NODE)
    assert not wants_node(a_daemonset([{**field, **expression("zone", "In", "b")}]), NODE)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["spec", "template", "affinity", "metadata"]), inner)
        ),
    )
)
def test_objects_of_any_shape_have_an_answer(value: object) -> None:
    assert wants_node({"spec": value}, {"metadata": value}) is True
