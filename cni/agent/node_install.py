"""The plugin on the node: there while this agent runs, and whether it stays (cni.md 2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
import structlog
import trio

from cni.agent.errors import KubeError
from cni.agent.kube import NOT_FOUND
from cni.agent.kube_http import KubeClient
from cni.agent.metrics import AgentMetrics
from cni.install.affinity import wants_node
from cni.install.errors import InstallError
from cni.install.installer import Installer, NodeFiles
from cni.install.kubeconfig import read_credentials
from cni.install.placement import Mode
from cni.install.settings import InstallSettings
from cni.install.shutdown import (
    RETRY_SECONDS,
    Answer,
    ShutdownRules,
    Verdict,
    decide_shutdown,
)

DAEMONSET = "istio-cni-node"  # the reference's name; the plugin knows the agent's pods by it
UNAUTHORIZED = 401
QUESTION_SECONDS = 2.0
FAREWELL_SECONDS = 15.0  # kubelet kills after 30

log = structlog.get_logger(component="install")


@dataclass(frozen=True, slots=True)
class Questions:
    """Asks Kubernetes about this agent's DaemonSet."""

    client: KubeClient
    namespace: str
    node_name: str

    async def ask(self) -> Answer:
        """Say whether an agent is wanted on this node."""
        daemonset = f"/apis/apps/v1/namespaces/{quote(self.namespace, safe='')}/daemonsets"
        try:
            found = await self._get(f"{daemonset}/{DAEMONSET}")
            node = await self._get(f"/api/v1/nodes/{quote(self.node_name, safe='')}")
        except KubeError as exc:
            log.info("cannot ask about the agent's DaemonSet", error=str(exc))
            return {NOT_FOUND: Answer.GOING, UNAUTHORIZED: Answer.UNAUTHORIZED}.get(
                exc.status or 0, Answer.UNKNOWN
            )
        metadata = found.get("metadata")
        if isinstance(metadata, Mapping) and metadata.get("deletionTimestamp"):
            return Answer.GOING
        return Answer.WANTED if wants_node(found, node) else Answer.NOT_HERE

    async def _get(self, path: str) -> Mapping[str, object]:
        body = await self.client.get(path)
        try:
            found = msgspec.json.decode(body, type=dict[str, object])
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise KubeError(f"{path}: not an object: {exc}") from exc
        return found


class NodeInstall:
    """Keeps the plugin in the runtime's configuration; `is_ready` once it is there."""

    def __init__(
        self, files: NodeFiles, questions: Questions, rules: ShutdownRules, metrics: AgentMetrics
    ) -> None:
        self.is_ready = False
        self._questions = questions
        self._rules = rules
        self._metrics = metrics
        self._installer = Installer(
            files,
            set_ready=self._set_ready,
            count=lambda result: metrics.installs.count(result.value).add(),
        )

    @classmethod
    def from_env(
        cls, env: Mapping[str, str], questions: Questions, metrics: AgentMetrics
    ) -> NodeInstall:
        """Read the installer's settings.

        Raises:
            InstallConfigError: some are malformed.
        """
        settings = InstallSettings.from_env(env)
        credentials = (lambda: read_credentials(env)) if settings.writes_kubeconfig else None
        rules = ShutdownRules(
            ambient_enabled=settings.ambient_enabled,
            safe_upgrade_disabled=settings.safe_upgrade_disabled,
            has_own_file=settings.placement.mode is Mode.OWN_FILE,
        )
        return cls(NodeFiles(settings, credentials=credentials), questions, rules, metrics)

    async def run(self) -> None:
        """Install, watch and repair, until cancelled."""
        await self._installer.run()

    async def is_uninstalled(self) -> bool:
        """Whether Kubernetes says that no agent will follow on this node."""
        answer = Answer.UNKNOWN
        with trio.move_on_after(QUESTION_SECONDS):
            answer = await self._questions.ask()
        return answer in (Answer.GOING, Answer.NOT_HERE)

    async def farewell(self) -> bool:
        """Decide whether the plugin goes along, and take it away if so; whether it did.

        It takes `FAREWELL_SECONDS` at most, after which everything stays as it is.
        """
        with trio.move_on_after(FAREWELL_SECONDS):
            if await self._decided() is Verdict.CLEAN_UP:
                try:
                    await self._installer.uninstall()
                except InstallError as exc:
                    log.warning("plugin not removed", error=str(exc))
                else:
                    return True
        return False

    async def _decided(self) -> Verdict:
        asked = 1
        while True:
            answer = await self._answer()
            verdict = decide_shutdown(self._rules, answer, asked=asked)
            log.info("stopping", answer=answer.name, verdict=verdict.name)
            if verdict is not Verdict.ASK_AGAIN:
                return verdict
            asked += 1
            await trio.sleep(RETRY_SECONDS)

    async def _answer(self) -> Answer:
        if not self._rules.needs_answer():
            await trio.lowlevel.checkpoint()
            return Answer.UNKNOWN
        return await self._questions.ask()

    def _set_ready(self, is_ready: bool) -> None:  # noqa: FBT001 - the installer says it so
        self.is_ready = is_ready
        self._metrics.install_ready.set(int(is_ready))
