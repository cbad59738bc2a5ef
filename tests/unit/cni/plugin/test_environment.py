from __future__ import annotations

import pytest

from cni.plugin.environment import is_identifier, parse_environment
from cni.plugin.errors import Code, PluginError

ADD = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/var/run/netns/cni-1",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
    "CNI_ARGS": "K8S_POD_UID=u;IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;X=y",
}


def refusal(env: dict[str, str]) -> PluginError:
    with pytest.raises(PluginError) as caught:
        parse_environment(env)
    return caught.value


def test_an_add_names_pod_and_sandbox() -> None:
    call = parse_environment(ADD)
    assert (call.command, call.container_id, call.netns) == (
        "ADD",
        "c0ffee",
        "/var/run/netns/cni-1",
    )
    assert (call.pod.namespace, call.pod.name, call.pod.uid) == ("shop", "cart", "u")
    assert not call.same_netns_allowed


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("ADD", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
        ("CHECK", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
        ("DEL", "CNI_CONTAINERID,CNI_IFNAME,CNI_PATH"),
        ("GC", "CNI_PATH"),
        ("STATUS", "CNI_PATH"),
    ],
)
def test_each_command_names_what_it_lacks(command: str, missing: str) -> None:
    error = refusal({"CNI_COMMAND": command})
    assert error.code is Code.BAD_ENVIRONMENT
    assert f"[{missing}]" in error.message


def test_version_needs_nothing() -> None:
    assert parse_environment({"CNI_COMMAND": "VERSION"}).command == "VERSION"


@pytest.mark.parametrize("command", ["", "add", "REMOVE"])
def test_other_commands_are_refused(command: str) -> None:
    assert refusal({**ADD, "CNI_COMMAND": command}).code is Code.BAD_ENVIRONMENT


def test_a_second_delete_comes_without_netns_and_with_nonsense_in_the_arguments() -> None:
    call = parse_environment({**ADD, "CNI_COMMAND": "DEL", "CNI_NETNS": "", "CNI_ARGS": "=;=="})
    assert call.netns == ""
    assert (call.pod.name, call.pod.namespace, call.pod.uid) == ("", "", "")


def test_a_delete_names_its_pod_for_the_log() -> None:
    assert parse_environment({**ADD, "CNI_COMMAND": "DEL"}).pod.name == "cart"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CNI_CONTAINERID", "../x"),
        ("CNI_CONTAINERID", "-x"),
        ("CNI_CONTAINERID", "x\n"),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "eth 0"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "sixteen-bytes-xx"),
        ("CNI_ARGS", "K8S_POD_NAME"),
        ("CNI_ARGS", "K8S_POD_NAME=a=b"),
        ("CNI_ARGS", "K8S_POD_NAME=a;"),
        ("CNI_ARGS", "K8S_POD_NAME=a;X=y"),
        ("CNI_ARGS", "IgnoreUnknown=0;X=y"),
    ],
)
def test_a_malformed_variable_is_refused(name: str, value: str) -> None:
    assert refusal({**ADD, name: value}).code is Code.BAD_ENVIRONMENT


def test_without_arguments_there_is_no_pod() -> None:
    pod = parse_environment({**ADD, "CNI_ARGS": ""}).pod
    assert (pod.name, pod.namespace, pod.uid) == ("", "", "")


@pytest.mark.parametrize(
    ("text", "allowed"), [("1", True), ("true", True), ("TRUE", True), ("0", False)]
)
def test_a_runtime_may_say_that_the_namespace_is_its_own(text: str, *, allowed: bool) -> None:
    assert parse_environment({**ADD, "CNI_NETNS_OVERRIDE": text}).same_netns_allowed is allowed


def test_identifiers_are_what_the_specification_says() -> None:
    assert is_identifier("a.b_c-D9")
    assert not any(map(is_identifier, ["", ".a", "a b", "a\n", "ä"]))
