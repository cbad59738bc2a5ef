from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import trio
from hypothesis import given, strategies as st

from cni.agent import plugin_events
from cni.agent.errors import (
    AgentError,
    EventError,
    KubeError,
    NetnsError,
    NoProxyError,
    PodUnknownError,
)
from cni.agent.http_server import Request
from cni.agent.metrics import AgentMetrics
from cni.agent.plugin_events import PluginDoor, PluginEvent, decode_event, on_lines
from cni.plugin.errors import Code, PluginError
from cni.plugin.event import announce
from tests.support.namespaces import open_descriptors
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import parse_ip

REFERENCE = (
    b'{"Netns":"/var/run/netns/cni-1","PodName":"p","PodNamespace":"n","IPs":[{"Interface":2,'
    b'"Address":{"IP":"10.1.2.3","Mask":"////AA=="},"Gateway":""}]}'
)


def test_the_references_event_is_read() -> None:
    assert decode_event(REFERENCE) == PluginEvent(
        netns="/var/run/netns/cni-1", name="p", namespace="n", ips=(parse_ip("10.1.2.3"),)  # type: ignore[arg-type]
    )  # fmt: skip


def test_our_own_keys_are_read_and_others_ignored() -> None:
    raw = {**json.loads(REFERENCE), "PodUID": "u", "ContainerID": "c", "Other": [1], "IPs": None}
    event = decode_event(json.dumps(raw).encode())
    assert (event.uid, event.container_id, event.ips) == ("u", "c", ())


def test_mapped_addresses_are_ipv4() -> None:
    event = decode_event(REFERENCE.replace(b"10.1.2.3", b"::ffff:10.1.2.3"))
    assert event.ips == (parse_ip("10.1.2.3"),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        REFERENCE + b"x",
        REFERENCE.replace(b"10.1.2.3", b"ten"),
        REFERENCE.replace(b'"p"', b'""'),
        REFERENCE.replace(b'"/var/run/netns/cni-1"', b"7"),
    ],
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(EventError):
        decode_event(body)


@given(st.binary(max_size=200))
def test_bytes_raise_nothing_else(body: bytes) -> None:
    with pytest.raises(EventError):
        decode_event(body)


class Office:
    """Admits as it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.events: list[tuple[PluginEvent, bool]] = []
        self.sleep = 0.0

    async def admit(self, event: PluginEvent, netns: PodNetns | None) -> None:
        self.events.append((event, netns is not None))
        if netns is not None:
            netns.close()
        await trio.sleep(self.sleep)
        if self.error is not None:
            raise self.error


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
async def run_dir(office: Office, tmp_path: Path) -> AsyncIterator[Path]:
    async with trio.open_nursery() as nursery:
        await nursery.start(PluginDoor(office.admit, AgentMetrics()).run, tmp_path)
        yield tmp_path
        nursery.cancel_scope.cancel()


async def send(run_dir: Path, body: bytes = REFERENCE, netns: str = "/proc/self/ns/net") -> None:
    """Do as the plugin does: with its own code, in a thread."""
    with trio.fail_after(10):
        await trio.to_thread.run_sync(lambda: announce(str(run_dir), body, netns=netns))


async def test_our_plugin_is_understood_and_its_descriptor_taken(
    run_dir: Path, office: Office
) -> None:
    await send(run_dir)
    before = open_descriptors()
    await send(run_dir)
    await send(run_dir, netns="/missing")
    assert open_descriptors() == before
    assert [has_fd for _, has_fd in office.events] == [True, True, False]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PodUnknownError("not yet"), Code.TRY_AGAIN_LATER),
        (NoProxyError("no proxy"), Code.TRY_AGAIN_LATER),
        (KubeError("down"), Code.TRY_AGAIN_LATER),
        (NetnsError("foreign"), Code.AGENT_REFUSED),
        (AgentError("other"), Code.AGENT_REFUSED),
        (RuntimeError("a bug"), Code.AGENT_REFUSED),
    ],
)
async def test_a_refusal_reaches_the_plugin_with_its_reason(
    run_dir: Path, office: Office, error: Exception, code: Code
) -> None:
    office.error = error
    with pytest.raises(PluginError) as raised:
        await send(run_dir)
    assert raised.value.code == code
    wanted = "internal error" if isinstance(error, RuntimeError) else str(error)
    assert wanted in raised.value.details


async def test_nonsense_is_refused_and_its_descriptor_closed(run_dir: Path, office: Office) -> None:
    with pytest.raises(PluginError, match="400"):
        await send(run_dir, b"{}")
    assert office.events == []


async def test_the_answer_comes_before_the_plugin_gives_up(
    run_dir: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_events, "ADMISSION_SECONDS", 0.05)
    office.sleep = 10
    with pytest.raises(PluginError) as raised:
        await send(run_dir)
    assert raised.value.details == "not done in time"


async def test_answers_are_counted(office: Office) -> None:
    metrics = AgentMetrics()
    door = PluginDoor(office.admit, metrics)
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    before = open_descriptors()
    assert (await door.on_event(Request("POST", "/cmdadd", "", REFERENCE, fds))).status == 200
    assert (await door.on_event(Request("POST", "/cmdadd", "", b"x"))).status == 400
    assert open_descriptors() == before - 2
    assert metrics.plugin_requests.count("200").value == 1
    assert metrics.plugin_requests.count("400").value == 1


async def test_the_plugins_lines_are_shown_among_ours() -> None:
    good = json.dumps({"level": "info", "time": "t", "msg": "hello", "pod": "p"})
    lines = [good, "nonsense", "[]", json.dumps({"level": "info", "msg": "no time"})]
    with structlog.testing.capture_logs() as shown:
        answer = await on_lines(Request("POST", "/log", "", json.dumps(lines).encode()))
    assert answer.status == 200
    assert [(entry["message"], entry["plugin.pod"]) for entry in shown] == [("hello", "p")]
    assert (await on_lines(Request("POST", "/log", "", b"{}"))).status == 400
