from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cni.plugin.commands import run
from cni.plugin.environment import Call, Pod
from cni.plugin.errors import Code, PluginError
from cni.plugin.journal import Journal
from cni.plugin.netconf import NetConf, parse_netconf
from tests.support.plugin_agent import StandInAgent

PREVIOUS = '{"cniVersion":"1.1.0", "ips":[{"address":"10.1.2.3/24"}] }'
CART = Pod("cart-0", "shop", "uid-1")


@pytest.fixture
def agent() -> Iterator[StandInAgent]:
    with StandInAgent() as agent:
        yield agent


def a_call(
    command: str = "ADD",
    *,
    pod: Pod = CART,
    netns: str = "/var/run/netns/cni-1",
    same_netns_allowed: bool = False,
) -> Call:
    return Call(
        command, container_id="c", netns=netns, same_netns_allowed=same_netns_allowed, pod=pod
    )


def a_conf(agent: StandInAgent, **keys: object) -> NetConf:
    config = {
        "name": "net",
        "cniVersion": "1.1.0",
        "cni_agent_run_dir": str(agent.run_dir),
        "ambient_enabled": True,
        "agent_decides": True,
        "exclude_namespaces": ["kube-system"],
        "pod_namespace": "istio-system",
        **keys,
    }
    return parse_netconf(f'{json.dumps(config)[:-1]}, "prevResult": {PREVIOUS}}}'.encode())


def carried_out(agent: StandInAgent, call: Call, **keys: object) -> str:
    return run(call, a_conf(agent, **keys), Journal(lambda line: None), seconds=5.0)


def refusal(agent: StandInAgent, call: Call, **keys: object) -> PluginError:
    with pytest.raises(PluginError) as caught:
        carried_out(agent, call, **keys)
    return caught.value


def test_an_add_asks_the_agent_and_passes_the_result_on(agent: StandInAgent) -> None:
    assert carried_out(agent, a_call()) == PREVIOUS
    assert [body["PodName"] for body in agent.bodies] == ["cart-0"]


def test_an_add_that_the_agent_refuses_fails(agent: StandInAgent) -> None:
    agent.refuse(500, "no proxy")
    assert refusal(agent, a_call()).details == "no proxy"


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(Pod("dns", "kube-system", "u"), id="excluded namespace"),
        pytest.param(Pod("", "shop", ""), id="no name"),
        pytest.param(Pod("cart", "", ""), id="no namespace"),
        pytest.param(Pod("istio-cni-node-x7f", "istio-system", "u"), id="the agent itself"),
    ],
)
def test_some_pods_start_whether_the_agent_is_there_or_not(agent: StandInAgent, pod: Pod) -> None:
    agent.refuse(500, "nobody shall start")
    for keys in ({}, {"cni_agent_run_dir": "/nowhere"}, {"agent_decides": False}):
        assert carried_out(agent, a_call(pod=pod), **keys) == PREVIOUS
    assert agent.requests == []


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(Pod("istio-cni-node-x7f", "shop", "u"), id="named as the agent, elsewhere"),
        pytest.param(Pod("my-istio-cni-node-", "istio-system", "u"), id="another name there"),
    ],
)
def test_pods_that_look_like_the_agent_are_asked_for(agent: StandInAgent, pod: Pod) -> None:
    carried_out(agent, a_call(pod=pod))
    assert len(agent.requests) == 1


def test_with_ambient_mode_off_nobody_is_asked(agent: StandInAgent) -> None:
    assert carried_out(agent, a_call(), ambient_enabled=False) == PREVIOUS
    assert agent.requests == []


def test_under_another_agent_s_configuration_pods_fail_rather_than_start_unprotected(
    agent: StandInAgent,
) -> None:
    error = refusal(agent, a_call(), agent_decides=None)
    assert error.code is Code.BAD_CONFIG
    assert "agent_decides" in error.details
    assert agent.requests == []


def test_the_host_s_namespace_is_never_announced(agent: StandInAgent) -> None:
    assert refusal(agent, a_call(netns="/proc/self/ns/net")).code is Code.BAD_NETNS
    assert agent.requests == []


def test_unless_the_runtime_says_that_this_is_meant(agent: StandInAgent) -> None:
    carried_out(agent, a_call(netns="/proc/self/ns/net", same_netns_allowed=True))
    assert len(agent.requests) == 1


@pytest.mark.parametrize("command", ["DEL", "CHECK", "STATUS", "GC"])
@pytest.mark.parametrize("netns", ["", "/var/run/netns/gone", "/proc/self/ns/net"])
def test_the_other_commands_succeed_always_and_ask_nobody(
    agent: StandInAgent, command: str, netns: str
) -> None:
    broken = {"exclude_namespaces": 7, "ambient_enabled": "?"}
    assert carried_out(agent, a_call(command, netns=netns), **broken) == ""
    assert agent.requests == []


@pytest.mark.parametrize(
    ("command", "version", "works"),
    [
        ("CHECK", "0.3.1", False),
        ("CHECK", "0.4.0", True),
        ("STATUS", "1.0.0", False),
        ("STATUS", "1.1.0", True),
        ("GC", "1.0.0", False),
        ("GC", "1.1.0", True),
        ("DEL", "0.1.0", True),
    ],
)
def test_a_command_exists_from_some_version_on(
    agent: StandInAgent, command: str, version: str, *, works: bool
) -> None:
    if works:
        assert carried_out(agent, a_call(command), cniVersion=version) == ""
    else:
        error = refusal(agent, a_call(command), cniVersion=version)
        assert error.code is Code.INCOMPATIBLE_VERSION
