from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cni.plugin.__main__ import Outcome, execute, read_stdin
from cni.plugin.errors import PluginError
from cni.plugin.journal import Journal
from tests.support.plugin_agent import StandInAgent

ROOT = Path(__file__).parents[4]
ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/var/run/netns/cni-1",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u",
}
# What may not be imported at any pod's start: each alone costs more than the plugin has.
SLOW_MODULES = {"typing", "dataclasses", "pathlib", "logging", "http.client", "ssl", "subprocess"}


def a_config(**keys: object) -> bytes:
    config = {"name": "net", "cniVersion": "1.0.0", "ambient_enabled": True, "agent_decides": True}
    return json.dumps({**config, **keys}).encode()


def executed(env: dict[str, str], read: Callable[[], bytes]) -> tuple[Outcome, list[bytes]]:
    lines: list[bytes] = []
    return execute(env, read, Journal(lines.append), seconds=0.01), lines


def as_program(env: dict[str, str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "cni.plugin"],
        cwd=ROOT,
        env=env,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=30,
    )


def test_a_failure_is_an_object_on_stdout_and_a_line_in_the_log(tmp_path: Path) -> None:
    config = a_config(cni_agent_run_dir=str(tmp_path))
    outcome, lines = executed(ENV, lambda: config)
    answer = json.loads(outcome.stdout)
    assert outcome.status == 1
    assert answer["code"] == 11
    assert answer["cniVersion"] == "1.0.0"
    line = json.loads(lines[-1])
    assert (line["level"], line["pod"], line["container"]) == ("error", "shop/cart-0", "c0ffee")
    assert line["error"] == answer["msg"]


def test_a_bug_is_an_answer_too() -> None:
    def explode() -> bytes:
        raise RuntimeError("boom")

    outcome, _ = executed(ENV, explode)
    answer = json.loads(outcome.stdout)
    assert (outcome.status, answer["code"], answer["details"]) == (1, 999, "RuntimeError: boom")


@given(st.sampled_from(["ADD", "DEL", "CHECK", "STATUS", "GC"]), st.binary())
def test_any_stdin_is_answered(command: str, stdin: bytes) -> None:
    outcome, _ = executed({**ENV, "CNI_COMMAND": command}, lambda: stdin)
    assert outcome.status == 1
    assert json.loads(outcome.stdout)["code"] in (6, 7)


def test_version_reads_no_config() -> None:
    def never() -> bytes:
        raise AssertionError("stdin was read")

    outcome, _ = executed({"CNI_COMMAND": "VERSION"}, never)
    assert outcome.status == 0
    assert json.loads(outcome.stdout)["cniVersion"] == "1.1.0"


def test_stdin_is_read_to_its_end_and_not_beyond_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "stdin"
    path.write_bytes(b"x" * 100_000)
    with path.open("rb") as file:
        assert read_stdin(file.fileno()) == b"x" * 100_000
    os.truncate(path, 9 * 1024 * 1024)
    with path.open("rb") as file, pytest.raises(PluginError, match="too long"):
        read_stdin(file.fileno())
    with pytest.raises(PluginError, match="reading from stdin"):
        read_stdin(-1)


def test_the_program_answers_the_runtime() -> None:
    with StandInAgent() as agent:
        previous = '{"cniVersion": "1.0.0",  "ips": []}'
        config = a_config(cni_agent_run_dir=str(agent.run_dir)).decode()
        stdin = f'{config[:-1]}, "prevResult": {previous}}}'.encode()
        run = as_program(ENV, stdin)
        assert (run.returncode, run.stdout.decode()) == (0, previous + "\n")
        assert agent.bodies[0]["PodUID"] == "u"
        assert json.loads(run.stderr)["msg"] == "node agent lets the pod start"
        agent.refuse(500, "no")
        run = as_program(ENV, stdin)
        assert (run.returncode, json.loads(run.stdout)["code"]) == (1, 100)


def test_somebody_who_starts_it_by_hand_learns_what_it_is() -> None:
    run = as_program({}, b"")
    assert (run.returncode, run.stdout) == (0, b"")
    assert b"CNI plugin" in run.stderr
    assert b"1.1.0" in run.stderr


def test_it_imports_nothing_that_takes_long() -> None:
    code = "import sys; sys.path.insert(0, '.'); import cni.plugin.__main__; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-ISc", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert SLOW_MODULES & set(run.stdout.split()) == set()
