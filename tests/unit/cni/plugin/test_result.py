from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cni.plugin.errors import Code, PluginError
from cni.plugin.netconf import PreviousResult
from cni.plugin.result import add_result, error_result, version_result


def previous(text: str) -> PreviousResult:
    return PreviousResult(text, json.loads(text))


def test_a_previous_result_goes_out_byte_for_byte() -> None:
    text = '{"ips" : [ ],\n "cniVersion":"1.0.0", "unknown": {"k":1.0} }'
    assert add_result(previous(text), "1.0.0") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "cniVersion": "0.3.1"}', '{"a": 1, "cniVersion": "1.0.0"}'),
        ('{"cniVersion": null,"a": 1}', '{"cniVersion": "1.0.0","a": 1}'),
        ('{ "a": 1}', '{"cniVersion":"1.0.0", "a": 1}'),
        ("{ }", '{"cniVersion":"1.0.0" }'),
    ],
)
def test_only_a_wrong_version_is_put_right(text: str, expected: str) -> None:
    assert add_result(previous(text), "1.0.0") == expected


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_nothing_but_the_version_changes(members: dict[str, object]) -> None:
    result = json.loads(add_result(previous(json.dumps(members)), "1.1.0"))
    assert result == {**members, "cniVersion": "1.1.0"}


def test_without_a_previous_result_there_is_a_minimal_one() -> None:
    assert json.loads(add_result(None, "0.4.0")) == {"cniVersion": "0.4.0", "dns": {}}


def test_the_versions_we_speak() -> None:
    answer = json.loads(version_result())
    assert answer["cniVersion"] == "1.1.0"
    assert {"0.3.1", "0.4.0", "1.0.0", "1.1.0"} <= set(answer["supportedVersions"])


def test_an_error_says_code_message_and_details() -> None:
    text = error_result(PluginError(Code.AGENT_REFUSED, "no", "why"), "1.0.0")
    assert json.loads(text) == {"cniVersion": "1.0.0", "code": 100, "msg": "no", "details": "why"}
    assert "details" not in json.loads(error_result(PluginError(Code.IO_FAILURE, "no"), "1.0.0"))
