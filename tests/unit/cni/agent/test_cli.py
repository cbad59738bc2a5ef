from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import trio

from cni.agent import cli
from cni.agent.config import AgentConfig
from cni.agent.http_server import serve
from cni.agent.kube_http import ApiServer
from cni.agent.operators import CONTROL_SOCKET, control_routes
from cni.agent.unix_socket import listen_unix
from tests.support.kube import FakeKube, running
from tests.unit.cni.agent.test_operators import Insight
from ztunnel.errors import ConfigError
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns


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


@pytest.mark.netns
async def test_asked_to_stop_it_leaves_with_success(tmp_path: Path) -> None:
    async with running(FakeKube()) as kube:
        assert kube.server is not None
        env = settings(tmp_path, kube.server.port)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "cni.agent"], env=env, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        async with process.stdout:
            output = b""
            with trio.fail_after(20):
                while b"a first look at all pods" not in output:
                    piece = await process.stdout.receive_some()
                    assert piece, output
                    output += piece
            process.send_signal(signal.SIGTERM)
            with trio.fail_after(10):
                assert await process.wait() == 0
            assert not (tmp_path / "z.sock").exists()
            assert list((tmp_path / "run").iterdir()) == []
