from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.plugin.environment import Call, Pod
from cni.plugin.errors import Code, PluginError
from cni.plugin.event import announce, encode_event
from cni.plugin.netconf import PreviousResult
from tests.support.plugin_agent import StandInAgent

CALL = Call(
    "ADD",
    container_id="c0ffee",
    netns="/var/run/netns/cni-1",
    same_netns_allowed=False,
    pod=Pod("p", "n", "uid-1"),
)


@pytest.fixture
def agent() -> Iterator[StandInAgent]:
    with StandInAgent() as agent:
        yield agent


def refusal(agent: StandInAgent, *, seconds: float = 5.0) -> PluginError:
    with pytest.raises(PluginError) as caught:
        announce(str(agent.run_dir), b"{}", netns="/nowhere", seconds=seconds)
    return caught.value


def test_the_reference_finds_its_keys_and_ours_come_behind() -> None:
    members = {"ips": [{"interface": 2, "address": "10.1.2.3/24"}]}
    body = encode_event(CALL, PreviousResult("", members), "1.0.0")
    assert list(json.loads(body).items()) == [
        ("Netns", "/var/run/netns/cni-1"),
        ("PodName", "p"),
        ("PodNamespace", "n"),
        (
            "IPs",
            [{"Interface": 2, "Address": {"IP": "10.1.2.3", "Mask": "////AA=="}, "Gateway": ""}],
        ),
        ("PodUID", "uid-1"),
        ("ContainerID", "c0ffee"),
    ]


def test_without_a_previous_result_there_are_no_addresses() -> None:
    assert json.loads(encode_event(CALL, None, "1.0.0"))["IPs"] is None


def test_the_agent_gets_the_event_and_the_namespace(agent: StandInAgent) -> None:
    announce(str(agent.run_dir), b'{"a": 1}', netns="/proc/self/ns/net")
    assert agent.bodies == [{"a": 1}]
    assert agent.requests[0].startswith(b"POST /cmdadd HTTP/1.1\r\nHost: unix\r\n")
    own = Path("/proc/self/ns/net").stat()
    assert [(fd.st_dev, fd.st_ino) for fd in agent.descriptors] == [(own.st_dev, own.st_ino)]


@pytest.mark.parametrize("netns", ["/nowhere/at/all", "", "a\0b"])
def test_a_namespace_that_cannot_be_opened_is_left_to_the_agent(
    agent: StandInAgent, netns: str
) -> None:
    announce(str(agent.run_dir), b"{}", netns=netns)
    assert agent.bodies == [{}]
    assert agent.descriptors == []


def test_opening_a_pipe_by_mistake_does_not_stop_us(agent: StandInAgent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    announce(str(agent.run_dir), b"{}", netns=str(tmp_path / "pipe"))
    assert len(agent.requests) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, Code.AGENT_REFUSED),
        (400, Code.AGENT_REFUSED),
        (204, Code.AGENT_REFUSED),
        (503, Code.TRY_AGAIN_LATER),
    ],
)
def test_anything_but_200_fails_the_pod_with_the_agent_s_words(
    agent: StandInAgent, status: int, code: Code
) -> None:
    agent.refuse(status, "no ztunnel connected\n")
    error = refusal(agent)
    assert (error.code, error.details) == (code, "no ztunnel connected")
    assert str(status) in error.message


def test_nonsense_fails_the_pod(agent: StandInAgent) -> None:
    agent.answer = b"\xff\xfe\r\n\r\n"
    assert refusal(agent).code is Code.TRY_AGAIN_LATER


def test_an_agent_that_hangs_up_fails_the_pod(agent: StandInAgent) -> None:
    agent.answer = b""
    assert "ended before" in refusal(agent).details


def test_no_agent_fails_the_pod(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="does not answer") as caught:
        announce(str(tmp_path), b"{}", netns="", seconds=0.01)
    assert caught.value.code is Code.TRY_AGAIN_LATER
