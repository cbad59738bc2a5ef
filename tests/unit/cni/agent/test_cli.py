from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import trio

from cni.agent import cli
from cni.agent.config import AgentConfig
from cni.agent.http_server import serve
from cni.agent.kube_http import ApiServer
from cni.agent.operators import CONTROL_SOCKET, control_routes
from cni.agent.plugin_events import LOG_SOCKET
from cni.agent.unix_socket import listen_unix
from tests.support.kube import FakeKube, running
from tests.unit.cni.agent.test_operators import Insight
from ztunnel.errors import ConfigError
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns
from ztunnel.telemetry.log import PIPELINE


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_is_printed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word], {}) == 0
    assert capsys.readouterr().out == cli.USAGE


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dance"], {}) == 1
    assert "unknown command 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "version", "run"])
def test_words_that_no_command_knows_are_refused(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "extra", "words"], {}) == 2
    err = capsys.readouterr().err
    assert err == f"ztunnel-cni-agent {command}: unknown words: extra words\n\n{cli.USAGE}"
    assert cli.main([command, "--help"], {}) == 0
    assert capsys.readouterr().out == cli.USAGE


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("version", "--version"):
        assert cli.main([word], {}) == 0
        assert capsys.readouterr().out == f"ztunnel-cni-agent {version('ztunnel')}\n"


@pytest.mark.parametrize("words", [[], ["run"], ["--log_output_level=default:info"]])
def test_wrong_settings_stop_the_start_and_are_listed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words, {"MONITORING_PORT": "x"}) == 1
    err = capsys.readouterr().err
    assert "ztunnel-cni-agent: invalid env var MONITORING_PORT=x" in err
    assert "ztunnel-cni-agent: NODE_NAME is not set" in err


def test_without_an_agent_there_is_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"CNI_AGENT_RUN_DIR": str(tmp_path)}
    assert cli.main(["status"], env) == 1
    assert "no node agent answers at" in capsys.readouterr().err
    assert cli.main(["rules", "--pod", "shop/a"], env) == 1


async def test_a_running_agent_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = {"CNI_AGENT_RUN_DIR": str(tmp_path)}
    with listen_unix(tmp_path / CONTROL_SOCKET, mode=0o600) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, control_routes(Insight("Kubernetes")))

            async def run(*words: str) -> int:
                return await trio.to_thread.run_sync(cli.main, list(words), env)

            assert await run("status") == 0
            assert "node n: not ready, waiting for Kubernetes" in capsys.readouterr().out
            assert await run("rules", "--pod", "shop/a") == 0
            assert capsys.readouterr().out == "table\n"
            assert await run("rules", "--pod", "shop/b") == 1
            assert "not in the mesh" in capsys.readouterr().err
            nursery.cancel_scope.cancel()


MARKS = ["one", "two", "three", "four", "five", "six"]
API = ApiServer(host="localhost", port=1)


def test_the_node_is_seen_through_the_mounted_folders_or_directly(tmp_path: Path) -> None:
    config = AgentConfig(node_name="n", api=API, host_root=tmp_path)
    with PodNetns.open("/proc/self/ns/net") as host:
        direct = cli.node_view(config, host)
        assert direct.proc == Path("/proc")
        (tmp_path / "proc/1/ns").mkdir(parents=True)
        assert cli.node_view(config, host).host == host.id
        (tmp_path / "proc/1/ns/net").touch()
        mounted = cli.node_view(config, host)
        status = (tmp_path / "proc/1/ns/net").stat()
        assert mounted.host == netns.NetnsId(status.st_ino, status.st_dev)
        assert mounted.proc == tmp_path / "proc"
        assert mounted.roots == (tmp_path, tmp_path / "proc/1/root", Path("/"))


def test_a_host_namespace_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    config = AgentConfig(node_name="n", api=API, host_root=tmp_path, switch_to_host_netns=True)
    with pytest.raises(ConfigError, match="cannot open the host's network namespace"):
        cli._host_netns(config)


def settings(folder: Path, port: int) -> dict[str, str]:
    """Settings of an agent that touches nothing but a folder; `port`: of the API server."""
    return {
        "PATH": os.environ["PATH"],
        "NODE_NAME": "n",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(port),
        "KUBERNETES_SERVICE_PROTOCOL": "http",
        "ZTUNNEL_CNI_TOKEN_FILE": "",
        "ZTUNNEL_CNI_PROBES": "none",
        "ZTUNNEL_CNI_INSTALL": "false",
        "ZTUNNEL_CNI_HEALTH_PORT": "0",
        "MONITORING_PORT": "0",
        "CNI_AGENT_RUN_DIR": str(folder / "run"),
        "ZTUNNEL_UDS_ADDRESS": str(folder / "z.sock"),
    }


@pytest.mark.netns
@pytest.mark.requires_program("setpriv")
def test_without_a_capability_it_does_not_start_and_says_which(tmp_path: Path) -> None:
    agent = ["setpriv", "--bounding-set=-sys_ptrace", sys.executable, "-m", "cni.agent"]
    done = subprocess.run(
        agent, env=settings(tmp_path, 1), capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 1
    assert "lacks CAP_SYS_PTRACE (to find the namespaces of other processes):" in done.stderr
    assert not (tmp_path / "run").exists()


class RunningAgent:
    """An agent in a process of its own; `output` is what was read of its log."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.output = ""

    async def until(self, text: str) -> str:
        """Wait for a line; return it."""
        stdout = self.process.stdout
        assert stdout is not None
        with trio.fail_after(20):
            while text not in self.output or not self.output.endswith("\n"):
                piece = await stdout.receive_some()
                assert piece, self.output
                self.output += piece.decode()
        return next(line for line in self.output.splitlines() if text in line)

    async def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with trio.fail_after(10):
            assert await self.process.wait() == 0


@asynccontextmanager
async def running_agent(folder: Path, *words: str) -> AsyncIterator[RunningAgent]:
    async with running(FakeKube()) as kube:
        assert kube.server is not None
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "cni.agent", "run", "--ctrlz_port=0", *words],
            env=settings(folder, kube.server.port),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        async with process.stdout:
            agent = RunningAgent(process)
            try:
                await agent.until("a first look at all pods")
                yield agent
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.move_on_after(5, shield=True):
                        await process.wait()


@pytest.mark.netns
async def test_asked_to_stop_it_leaves_with_success(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.stop()
        assert not (tmp_path / "z.sock").exists()
        assert list((tmp_path / "run").iterdir()) == []


async def change_level(controlz: str, scope: str, level: str) -> None:
    url = f"http://{controlz}/scopej/{scope}"
    body = json.dumps({"output_level": level})
    command = ["curl", "-sS", "--fail", "--max-time", "10", "-X", "PUT", "-d", body, url]
    assert (await trio.run_process(command, capture_stdout=True)).stdout == b""


async def plugin_says(run_dir: Path, level: str, message: str) -> None:
    lines = [json.dumps({"level": level, "time": "2026-01-02T03:04:05Z", "msg": message})]
    command = ["curl", "-sS", "--fail", "--max-time", "10", "--unix-socket", run_dir / LOG_SOCKET]
    await trio.run_process([*command, "-d", json.dumps(lines), "http://unix/log"])


@pytest.mark.netns
@pytest.mark.requires_program("curl")
async def test_levels_change_while_it_runs_and_lines_appear_after_that_and_not_before(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as agent:
        controlz = (await agent.until("ControlZ served")).rpartition("address=")[2]
        assert controlz.startswith("127.0.0.1:")
        for scope, marks in (
            ("cni-plugin", ["one", "two", "three"]),
            ("cni-agent", ["four", "five", "six"]),
        ):
            for level, mark in zip(("info", "debug", "info"), marks, strict=True):
                await change_level(controlz, scope, level)
                if scope == "cni-plugin":
                    await plugin_says(tmp_path / "run", "debug", mark)
                else:
                    await trio.to_thread.run_sync(
                        cli.ask, {"CNI_AGENT_RUN_DIR": str(tmp_path / "run")}, f"/{mark}"
                    )
                # What is logged is written in order: once this is there, nothing else comes.
                await plugin_says(tmp_path / "run", "error", f"end of {mark}")
                await agent.until(f"end of {mark}")
        await agent.stop()
        assert [mark for mark in MARKS if f'message="{mark}"' in agent.output] == ["two"]
        assert [mark for mark in MARKS if f'path="/{mark}"' in agent.output] == ["five"]
        assert 'scope="cni-agent" level="debug" before="info"' in agent.output


@pytest.mark.netns
@pytest.mark.requires_program("curl")
async def test_levels_and_form_of_the_log_are_flags(tmp_path: Path) -> None:
    words = ["--log_output_level=cni-agent:debug,cni-plugin:error,grpc:none", "--log_as_json"]
    async with running_agent(tmp_path, *words) as agent:
        await plugin_says(tmp_path / "run", "info", "hidden")
        await trio.to_thread.run_sync(
            cli.ask, {"CNI_AGENT_RUN_DIR": str(tmp_path / "run")}, "/seen"
        )
        line = json.loads(await agent.until('"/seen"'))
        assert (line["level"], line["scope"]) == ("debug", "cni::agent::http_server")
        assert json.loads(await agent.until("no such scopes"))["scopes"] == "grpc"
        assert "hidden" not in agent.output
        await agent.stop()


def test_a_wrong_flag_stops_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--ctrlz_address=*"], {"NODE_NAME": "n"}) == 1
    err = capsys.readouterr().err
    assert err.startswith("ztunnel-cni-agent: invalid flag --ctrlz_address='*': not a loopback")


@pytest.mark.netns  # it must have all capabilities to get as far as that
def test_the_installer_tells_the_plugin_its_level(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = []

    def run(entry: object, *words: object) -> None:
        told.append(words[2])

    monkeypatch.setattr(cli.trio, "run", run)
    env = {**settings(tmp_path, 1), "ZTUNNEL_CNI_INSTALL": "true", "PLUGIN_LOG_LEVEL": "warn"}
    usual = str(PIPELINE.filter)
    try:
        for word in ("--log_output_level=cni-plugin:debug", "--log_output_level=debug"):
            assert cli.main([word], env) == 0
    finally:
        PIPELINE.set_up(usual, json=False)
    assert [one["PLUGIN_LOG_LEVEL"] for one in told] == ["debug", "warn"]
