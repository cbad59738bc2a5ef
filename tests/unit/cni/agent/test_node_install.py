from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from cni.agent import node_install
from cni.agent.errors import KubeError
from cni.agent.kube_http import ApiServer, KubeClient
from cni.agent.metrics import AgentMetrics
from cni.agent.node_install import NodeInstall, Questions
from cni.install.errors import ConflistError, InstallConfigError
from cni.install.installer import Done, NodeFiles
from cni.install.shutdown import Answer, ShutdownRules
from tests.support.kube import eventually

WANTED = {"metadata": {}, "spec": {"template": {"spec": {"nodeSelector": {"os": "linux"}}}}}
NODE = {"metadata": {"labels": {"os": "linux"}}}


class Client(KubeClient):
    """Gives what it was given; a number is a refusal, None no answer."""

    def __init__(self, daemonset: object, node: object = NODE) -> None:
        super().__init__(ApiServer(host="localhost", port=1))
        self._answers = {"daemonsets": daemonset, "nodes": node}

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        answer = next(answer for kind, answer in self._answers.items() if kind in path)
        if answer is None or isinstance(answer, int):
            raise KubeError("no", status=answer)
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("daemonset", "node", "answer"),
    [
        (WANTED, NODE, Answer.WANTED),
        (WANTED, {"metadata": {"labels": {"os": "other"}}}, Answer.NOT_HERE),
        ({**WANTED, "metadata": {"deletionTimestamp": "now"}}, NODE, Answer.GOING),
        (404, NODE, Answer.GOING),
        (401, NODE, Answer.UNAUTHORIZED),
        (500, NODE, Answer.UNKNOWN),
        (None, NODE, Answer.UNKNOWN),
        (b"nonsense", NODE, Answer.UNKNOWN),
        (WANTED, None, Answer.UNKNOWN),
    ],
)
async def test_kubernetes_says_whether_an_agent_is_wanted(
    daemonset: object, node: object, answer: Answer
) -> None:
    assert await Questions(Client(daemonset, node), "istio-system", "n").ask() is answer


class Files(NodeFiles):
    """A node without files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[str] = []
        self.fails = False

    def folders(self) -> list[Path]:
        return [self.folder]

    def install(self) -> Done:
        self.steps.append("install")
        return Done(("plugin",), "", (), ())

    def uninstall(self) -> None:
        if self.fails:
            raise ConflistError("read-only")
        self.steps.append("uninstall")


RULES = ShutdownRules(ambient_enabled=True, safe_upgrade_disabled=False, has_own_file=True)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def an_install(files: Files, daemonset: object, **rules: Any) -> NodeInstall:
    chosen = ShutdownRules(**{name: rules.get(name, getattr(RULES, name)) for name in (
        "ambient_enabled", "safe_upgrade_disabled", "has_own_file")})  # fmt: skip
    questions = Questions(Client(daemonset), "istio-system", "n")
    return NodeInstall(files, questions, chosen, AgentMetrics())


async def test_the_plugin_is_installed_and_that_is_counted(files: Files) -> None:
    metrics = AgentMetrics()
    install = NodeInstall(files, Questions(Client(WANTED), "s", "n"), RULES, metrics)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(install.run)
        await eventually(lambda: install.is_ready)
        nursery.cancel_scope.cancel()
    assert metrics.installs.count("SUCCESS").value == 1
    assert metrics.install_ready.value == 1


async def test_for_a_successor_the_plugin_stays(files: Files) -> None:
    assert not await an_install(files, WANTED).farewell()
    assert files.steps == []


@pytest.mark.parametrize("daemonset", [404, 401])
async def test_without_a_successor_it_goes(files: Files, daemonset: object) -> None:
    assert await an_install(files, daemonset).farewell()
    assert files.steps == ["uninstall"]


@pytest.mark.parametrize(
    ("daemonset", "wanted"), [(404, True), (WANTED, False), (401, False), (None, False)]
)
async def test_only_kubernetes_can_say_that_the_agent_is_uninstalled(
    files: Files, daemonset: object, *, wanted: bool
) -> None:
    assert await an_install(files, daemonset).is_uninstalled() is wanted


async def test_switched_off_it_goes_without_asking(files: Files) -> None:
    assert await an_install(files, WANTED, ambient_enabled=False).farewell()


async def test_when_nobody_answers_an_own_file_stays(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_install, "RETRY_SECONDS", 0.01)
    assert not await an_install(files, None).farewell()
    assert await an_install(files, None, has_own_file=False).farewell()


async def test_what_cannot_be_removed_stays_and_is_no_crash(files: Files) -> None:
    files.fails = True
    assert not await an_install(files, 404).farewell()


def test_malformed_settings_of_the_installer_stop_the_start() -> None:
    questions = Questions(Client(WANTED), "s", "n")
    with pytest.raises(InstallConfigError):
        NodeInstall.from_env({"CNI_CONF_GROUP_READ": "x"}, questions, AgentMetrics())
    NodeInstall.from_env({"WRITE_PLUGIN_KUBECONFIG": "true"}, questions, AgentMetrics())
