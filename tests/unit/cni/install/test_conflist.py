from __future__ import annotations

import json

import pytest
from hypothesis import example, given, strategies as st

from cni.install.conflist import (
    Kind,
    decode,
    encode,
    insert,
    kind_of,
    our_entries,
    plugins_of,
    remove,
    wrap,
)
from cni.install.errors import ConflistError

OURS = {"name": "istio-cni", "type": "istio-cni", "ambient_enabled": True}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
others = st.builds(
    lambda kind, rest: {"type": kind, **rest},
    st.sampled_from(["ptp", "bridge", "istio-cni-2", "portmap"]),
    st.dictionaries(st.text().filter(lambda key: key != "type"), json_values, max_size=3),
)
ours_of_old = st.builds(lambda version: {"type": "istio-cni", "version": version}, st.integers())
spaces = st.text(alphabet=" \t\r\n", max_size=3)


@st.composite
def chains(draw: st.DrawFn, plugins: st.SearchStrategy[dict[str, object]]) -> str:
    """Write a chain with white space wherever JSON allows it, and members in any order."""

    def spaced(text: str) -> str:
        return f"{draw(spaces)}{text}{draw(spaces)}"

    dump = draw(st.sampled_from([json.dumps, lambda value: json.dumps(value, indent=2)]))
    elements = [spaced(dump(plugin)) for plugin in draw(st.lists(plugins, min_size=1, max_size=4))]
    keys = ["name", "cniVersion", "plugins", *draw(st.lists(st.text(), max_size=2))]
    values = {"name": '"k8s"', "cniVersion": '"1.0.0"', "plugins": f"[{','.join(elements)}]"}
    members = [
        f"{spaced(json.dumps(key))}:{spaced(values.get(key) or dump(draw(json_values)))}"
        for key in draw(st.permutations(sorted(set(keys))))
    ]
    return spaced("{" + ",".join(members) + "}")


@given(chains(others))
@example('{"name":"n","plugins":[{"type":"a"}]}')
def test_in_and_out_again_is_the_identity(text: str) -> None:
    assert remove(insert(text, OURS)) == text


@given(chains(others | ours_of_old))
def test_after_going_in_we_are_there_once_and_last(text: str) -> None:
    kept = [plugin for plugin in plugins_of(text) if plugin["type"] != "istio-cni"]  # type: ignore[index]
    assert plugins_of(insert(text, OURS)) == [*kept, OURS]
    assert insert(insert(text, OURS), OURS) == insert(text, OURS)


@given(chains(others | ours_of_old))
def test_after_going_out_nothing_of_us_is_left_and_everything_of_others(text: str) -> None:
    kept = [plugin for plugin in plugins_of(text) if plugin["type"] != "istio-cni"]  # type: ignore[index]
    assert plugins_of(remove(text)) == kept
    assert remove(insert(text, OURS)) == remove(text)


@given(chains(others))
def test_all_other_bytes_stay(text: str) -> None:
    longer = insert(text, OURS)
    added = len(longer) - len(text)
    assert any(longer[:at] + longer[at + added :] == text for at in range(len(text)))


@given(st.binary())
def test_bytes_that_are_not_text_survive(data: bytes) -> None:
    assert encode(decode(data)) == data


def test_the_entry_is_laid_out_like_its_neighbours() -> None:
    pretty = '{\n  "plugins": [\n    {"type": "a"},\n    {"type": "b"}\n  ]\n}\n'
    assert insert(pretty, {"type": "istio-cni", "dns": {}}) == (
        '{\n  "plugins": [\n    {"type": "a"},\n    {"type": "b"},\n    {\n'
        '      "type": "istio-cni",\n      "dns": {}\n    }\n  ]\n}\n'
    )
    assert insert('{"plugins":[{"type":"a"}]}', {"type": "istio-cni"}) == (
        '{"plugins":[{"type":"a"}, {"type": "istio-cni"}]}'
    )


def test_an_entry_that_somebody_changed_is_put_right() -> None:
    changed = insert('{"plugins":[{"type":"a"}]}', {**OURS, "ambient_enabled": False})
    assert our_entries(insert(changed, OURS)) == [OURS]


def test_somebody_may_stand_behind_us() -> None:
    text = insert('{"plugins":[{"type":"a"}]}', OURS)[:-2] + ', {"type": "b"}]}'
    assert insert(text, OURS) == text


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.conflist", '{"name":"n","plugins":[{"type":"x"}]}', Kind.CHAIN),
        ("a.conflist", '{"plugins":[{"type":"x"}]}', Kind.BROKEN),
        ("a.conflist", '{"name":"n","plugins":[]}', Kind.BROKEN),
        ("a.conflist", '{"name":"n","plugins":[{}]}', Kind.BROKEN),
        ("a.conflist", '{"name":"n","plugins":{"type":"x"}}', Kind.BROKEN),
        ("a.conflist", '{"name":"n","type":"x"}', Kind.BROKEN),
        ("a.conflist", '{"name":"n","plugins":[{"type":"x"}', Kind.BROKEN),
        ("a.conf", '{"type":"x"}', Kind.SINGLE),
        ("a.conf", '{"name":"n"}', Kind.BROKEN),
        ("a.conf", '{"type":7}', Kind.BROKEN),
        ("a.conf", "", Kind.BROKEN),
    ],
)
def test_what_a_runtime_could_use(name: str, text: str, kind: Kind) -> None:
    assert kind_of(name, text) is kind


def test_a_wrapped_plugin_keeps_its_text_name_and_version() -> None:
    text = ' {"type" : "ptp", "name":"pods","cniVersion":"0.4.0"}\n'
    wrapped = wrap(text)
    document = json.loads(wrapped)
    assert (document["name"], document["cniVersion"]) == ("pods", "0.4.0")
    assert text.strip() in wrapped
    assert plugins_of(wrapped) == [json.loads(text)]


def test_a_wrapped_plugin_without_name_gets_the_reference_s() -> None:
    document = json.loads(wrap('{"type":"ptp"}'))
    assert (document["name"], document["cniVersion"]) == ("k8s-pod-network", "0.3.1")


@given(st.text())
def test_what_is_no_chain_is_refused(text: str) -> None:
    for use in (remove, plugins_of):
        with pytest.raises(ConflistError):
            use(text)


@pytest.mark.parametrize("text", ["", "[]", '{"type": "ptp"', '{"type": NaN}'])
def test_what_is_no_plugin_cannot_be_wrapped(text: str) -> None:
    with pytest.raises(ConflistError):
        wrap(text)


@pytest.mark.parametrize("text", ["{}", '{"plugins": 7}'])
def test_a_chain_has_plugins(text: str) -> None:
    with pytest.raises(ConflistError):
        insert(text, OURS)
