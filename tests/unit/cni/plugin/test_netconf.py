from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cni.plugin.errors import Code, PluginError
from cni.plugin.netconf import (
    DEFAULT_RUN_DIR,
    SUPPORTED_VERSIONS,
    is_at_least,
    parse_enrolment,
    parse_netconf,
    parse_previous,
)


def a_config(**keys: object) -> bytes:
    return json.dumps({"name": "net", "cniVersion": "1.0.0", **keys}).encode()


def refusal(raw: bytes) -> PluginError:
    def parse_all() -> None:
        conf = parse_netconf(raw)
        parse_enrolment(conf)
        parse_previous(conf)

    with pytest.raises(PluginError) as caught:
        parse_all()
    return caught.value


def test_what_a_config_may_leave_out() -> None:
    conf = parse_netconf(b'{"name": "net", "plugin_log_level": null}')
    assert (conf.version, conf.run_dir, conf.log_level) == ("0.1.0", DEFAULT_RUN_DIR, "info")
    enrolment = parse_enrolment(conf)
    assert not enrolment.ambient_enabled
    assert not enrolment.agent_decides
    assert enrolment.exclude_namespaces == frozenset()
    assert enrolment.agent_namespace == ""
    assert parse_previous(conf) is None


def test_what_a_config_says() -> None:
    conf = parse_netconf(
        a_config(
            plugin_log_level="debug",
            cni_agent_run_dir="/run/x",
            ambient_enabled=True,
            agent_decides=True,
            exclude_namespaces=["kube-system"],
            pod_namespace="istio-system",
        )
    )
    enrolment = parse_enrolment(conf)
    assert (conf.log_level, conf.run_dir) == ("debug", "/run/x")
    assert enrolment.ambient_enabled
    assert enrolment.agent_decides
    assert enrolment.exclude_namespaces == {"kube-system"}
    assert enrolment.agent_namespace == "istio-system"


def test_an_unknown_log_level_is_no_reason_to_fail() -> None:
    assert parse_netconf(a_config(plugin_log_level="loud")).log_level == "info"


def test_the_previous_result_keeps_its_text() -> None:
    text = '{ "ips":[ ],"x" : 1e2, "\\u0061":"\\/" }'
    raw = f'{{"name":"n","prevResult" :{text} }}'.encode()
    previous = parse_previous(parse_netconf(raw))
    assert previous is not None
    assert previous.text == text
    assert previous.members == {"ips": [], "x": 100, "a": "/"}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", Code.UNDECODABLE),
        (b"[]", Code.UNDECODABLE),
        (b"\xff{}", Code.UNDECODABLE),
        (b"{} {}", Code.UNDECODABLE),
        (b"{}", Code.BAD_CONFIG),
        (a_config(name=""), Code.BAD_CONFIG),
        (a_config(name="a/b"), Code.BAD_CONFIG),
        (a_config(name=7), Code.UNDECODABLE),
        (a_config(cniVersion="2.0.0"), Code.INCOMPATIBLE_VERSION),
        (a_config(exclude_namespaces="kube-system"), Code.UNDECODABLE),
        (a_config(exclude_namespaces=[1]), Code.UNDECODABLE),
        (a_config(ambient_enabled="yes"), Code.UNDECODABLE),
        (a_config(agent_decides=1), Code.UNDECODABLE),
        (a_config(prevResult=[]), Code.UNDECODABLE),
    ],
)
def test_a_malformed_config_is_refused(raw: bytes, code: Code) -> None:
    assert refusal(raw).code is code


@given(st.binary())
def test_any_bytes_are_refused_as_a_cni_error(raw: bytes) -> None:
    assert refusal(raw).code in (Code.UNDECODABLE, Code.BAD_CONFIG)


def test_versions_have_an_order() -> None:
    assert is_at_least("1.0.0", "0.4.0")
    assert is_at_least("0.4.0", "0.4.0")
    assert not is_at_least("0.3.1", "0.4.0")
    assert SUPPORTED_VERSIONS[-1] == "1.1.0"
