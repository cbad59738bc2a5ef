"""The node agent: makes every part once, owns the root nursery, sets the order (cni.md 3.1).

How it works: first Kubernetes must have told about pods and namespaces. Then the host's probe rule
is put right, all pods that run are looked for once, and the pods that were enrolled before are
remembered, so that the first node proxy to connect gets all of them and stops none. Only then the
sockets for proxies and plugin exist. From there on pods are looked at whenever something changes,
when a proxy comes or goes, and now and then. On SIGTERM everything is left as it is: pods go on
being served and protected, and new ones wait for the next agent. Unless there will be none, because
Kubernetes says that the agent is uninstalled.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from functools import partial

import structlog
import trio

from cni.agent.admission import Admission
from cni.agent.agenda import Agenda
from cni.agent.config import KUBELET, AgentConfig
from cni.agent.eligibility import Decision
from cni.agent.enrol import Enroller
from cni.agent.errors import AgentError, UsurpedError
from cni.agent.http_server import Routes, listen_tcp, serve
from cni.agent.kube import Collection, Watcher, annotate
from cni.agent.kube_http import KubeClient
from cni.agent.kubelet import kubelet_uid
from cni.agent.metrics import AgentMetrics
from cni.agent.node_install import NodeInstall, Questions
from cni.agent.objects import (
    KubeNamespace,
    KubePod,
    Redirection,
    decode_namespace,
    decode_pod,
)
from cni.agent.operators import CONTROL_SOCKET, control_routes, health_routes, metrics_routes
from cni.agent.overrides import ProbeStrategy
from cni.agent.plugin_events import PluginDoor
from cni.agent.pod_kernel import KernelThreads, NetnsFinder
from cni.agent.pod_netns import NodeView
from cni.agent.probes import ProbeSets
from cni.agent.reconcile import Reconciler
from cni.agent.runtime_client import RuntimeClient
from cni.agent.status import AgentStatus, StatusReader
from cni.agent.unix_socket import FileIdentity, UnixListener, identity_of, listen_unix
from cni.agent.view import ClusterView
from cni.agent.zds_server import ZdsServer, serve_zds
from cni.redirect.branch_eni import Detours
from cni.redirect.errors import RedirectError
from cni.redirect.host import HostPlan
from ztunnel.linux.netns import PodNetns
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo

RELEASE_SECONDS = 10.0  # all that is done at the end must fit into kubelet's 30
HOST_RETRY_SECONDS = 2.0  # as the reference, which gives up after ten times
KUBERNETES, HOST_RULES, FIRST_LOOK, NODE_PROXY, PLUGIN = (
    "Kubernetes",
    "the host's probe rule",
    "a first look at all pods",
    "a node proxy",
    "the plugin's installation",
)

log = structlog.get_logger(component="agent")


class _Annotator:
    def __init__(self, client: KubeClient) -> None:
        self._client = client

    async def set(self, pod: KubePod, status: Redirection | None) -> bool:
        return await annotate(self._client, pod, status)


class Agent:
    """One node agent. `host`: the namespace kubelet's probes come from; the caller closes it."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        host: PodNetns,
        node: NodeView,
        rng: random.Random,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Make all parts; `env` is for the installer, which is left out without it.

        Raises:
            InstallConfigError: a setting of the installer is malformed.
        """
        self.config = config
        self.metrics = AgentMetrics()
        self.view = ClusterView()
        self.proxies = ZdsServer()
        self.waiting_for = {KUBERNETES, HOST_RULES, FIRST_LOOK}
        self._client = KubeClient(config.api)
        self._kernel = KernelThreads()
        self._finder = NetnsFinder(node, RuntimeClient(config.cri_sockets))
        snat = config.redirecting.probes is ProbeStrategy.SNAT
        self._probes = ProbeSets(
            host,
            HostPlan() if snat else None,
            self.metrics,
            detours=Detours(host, makes=config.probes_branch_enis),
        )
        self.reconciler = Reconciler(
            view=self.view,
            eligibility=config.eligibility,
            redirecting=config.redirecting,
            enroller=Enroller(
                kernel=self._kernel,
                spaces=self._finder,
                proxies=self.proxies,
                probes=self._probes,
                annotations=_Annotator(self._client),
                metrics=self.metrics,
            ),
            agenda=Agenda(rng),
            metrics=self.metrics,
        )
        self._admission = Admission(
            view=self.view,
            client=self._client,
            eligibility=config.eligibility,
            reconciler=self.reconciler,
            node=node,
        )
        self._watchers = self._make_watchers(rng)
        self._kubelet: int | None = None  # the user it was seen to run as
        self._install: NodeInstall | None = None
        if env is not None:
            questions = Questions(self._client, config.agent_namespace, config.node_name)
            self._install = NodeInstall.from_env(env, questions, self.metrics)
        self.metrics.watch_age(lambda: self._silence() or 0.0)

    def _make_watchers(self, rng: random.Random) -> tuple[Watcher[KubePod], Watcher[KubeNamespace]]:
        node = {"fieldSelector": f"spec.nodeName={self.config.node_name}"}
        pods = Collection("pods", "/api/v1/pods", decode_pod, node)
        namespaces = Collection("namespaces", "/api/v1/namespaces", decode_namespace)
        return (
            Watcher(self._client, pods, self.reconciler.pods_changed, rng=rng),
            Watcher(self._client, namespaces, self.reconciler.namespaces_changed, rng=rng),
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; `started` once pods can be enrolled. Errors come in a group.

        Raises:
            SocketPathError: a socket or port is taken.
            UsurpedError: another node agent has taken the proxies' socket.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._open_doors(nursery)
                await self._learn(nursery)
                await self._ensure_host()
                await self._remember()
                async with serve_zds(str(self.config.zds_path), self.proxies):
                    socket_file = identity_of(self.config.zds_path)
                    nursery.start_soon(self.reconciler.run)
                    nursery.start_soon(self._follow_proxies)
                    door = PluginDoor(self._admission.admit, self.metrics)
                    await nursery.start(door.run, self.config.run_dir)
                    if self._install is not None:
                        nursery.start_soon(self._install.run)
                    task_status.started()
                    self.reconciler.mark_all()
                    await self.reconciler.wait_idle()
                    self._done(FIRST_LOOK)
                    await self._sweep(socket_file)
        finally:
            self.reconciler.close()
            self.proxies.close()

    async def release(self) -> None:
        """While it still runs: if no agent will follow, take the pods out, should that be chosen.

        Otherwise they stay as they are, as with the reference: take the labels away before.
        """
        if not self.config.releases_pods or self._install is None or KUBERNETES in self.waiting_for:
            return
        if not await self._install.is_uninstalled():
            return
        pods = len(self.reconciler.enrolments)
        with trio.move_on_after(RELEASE_SECONDS):
            await self.reconciler.release_all()
        left = sorted(self.reconciler.enrolments)
        if left:
            log.error("pods stay redirected, and nobody will serve them", uids=", ".join(left))
        log.info("uninstalled", released=pods - len(left))

    async def farewell(self) -> None:
        """After `run`: if no agent will follow, take plugin and probe rule away."""
        if self._install is None or not await self._install.farewell():
            return
        try:
            await self._probes.remove()
        except RedirectError as exc:
            log.warning("probe rule not removed", error=str(exc))

    def status(self) -> AgentStatus:
        """Say how things are."""
        waiting = sorted(self.waiting_for)
        if self._install is not None and not self._install.is_ready:
            waiting.append(PLUGIN)
        if self.config.ready_needs_proxy and not self.proxies.is_ready:
            waiting.append(NODE_PROXY)
        return AgentStatus(
            node=self.config.node_name,
            ready=not waiting,
            waiting_for=waiting,
            proxies=self.proxies.connections,
            api_silent_seconds=self._silence(),
            pods=StatusReader(self.view, self.reconciler).pods(),
        )

    async def rules_of(self, pod: str) -> str | None:
        """Print what is wanted and found in a pod `namespace/name`; None if it is not ours."""
        namespace, _, name = pod.partition("/")
        found = self.view.pod_named(namespace, name)
        enrolment = self.reconciler.enrolments.get(found.uid) if found is not None else None
        if found is None or enrolment is None:
            await trio.lowlevel.checkpoint()
            return None
        plan, warnings = self.config.redirecting.plan_for(found)
        lines = [f"# {warning}" for warning in warnings]
        if enrolment.netns is None:
            lines.append("# wanted, but the pod's namespace is not known")
        else:
            problems = await self._kernel.inspect(enrolment.netns, plan)
            lines += [f"# differs: {problem}" for problem in problems] or ["# the kernel has:"]
        return "\n".join([*lines, str(plan)])

    def _silence(self) -> float | None:
        contacts = [watcher.last_contact for watcher in self._watchers]
        known = [contact for contact in contacts if contact is not None]
        return trio.current_time() - min(known) if len(known) == len(contacts) else None

    def _open_doors(self, nursery: trio.Nursery) -> None:
        config = self.config
        with ExitStack() as opened:  # if one cannot be had, the others are closed
            health = opened.enter_context(closing(listen_tcp(config.health_port)))
            monitoring = opened.enter_context(closing(listen_tcp(config.monitoring_port)))
            control = listen_unix(config.run_dir / CONTROL_SOCKET, mode=0o600)
            opened.pop_all()
        for door, routes in (
            (health, health_routes(self)),
            (monitoring, metrics_routes(self.metrics, self._refresh)),
            (control, control_routes(self)),
        ):
            nursery.start_soon(partial(_serve_and_close, door, routes))

    def _refresh(self) -> None:
        self.reconciler.count()
        self.metrics.proxies.set(self.proxies.connections)

    async def _learn(self, nursery: trio.Nursery) -> None:
        for watcher in self._watchers:
            nursery.start_soon(watcher.run)
        for watcher in self._watchers:
            await watcher.synced.wait()
        self._done(KUBERNETES)

    async def _ensure_host(self) -> None:
        """Write the probe rule, however long it takes: without it pods fail their probes.

        Those that were enrolled before stay exempt, also while there is no proxy to serve them.
        """
        for pod in self.view.pods:
            if pod.status == Redirection.ENABLED and not pod.is_over:
                self._probes.remember(pod.uid, pod.ips)
        if self._probes.plan is not None:
            self._probes.plan = await self._host_plan()
        while True:
            try:
                await self._probes.ensure()
            except RedirectError as exc:
                log.warning("probe rule not written", error=str(exc))
                await trio.sleep(HOST_RETRY_SECONDS)
            else:
                break
        self._done(HOST_RULES)

    async def _host_plan(self) -> HostPlan:
        owner = self.config.probe_owner
        if owner == KUBELET:
            found = await trio.to_thread.run_sync(kubelet_uid, self._finder.node.proc)
            if found is None and self._kubelet is None:
                log.warning("kubelet not found, root may probe")
                found = 0
            # One that is just being restarted comes back as whom it was.
            owner = self._kubelet = self._kubelet if found is None else found
        assert not isinstance(owner, str)
        sources = self.config.redirecting.probe_sources
        if not self.config.redirecting.ipv6:
            sources = sources[:1]
        return HostPlan(sources=sources, owner=owner)

    async def _remember(self) -> None:
        """Find all pods that run, and make the first snapshot for the node proxies."""
        pods = [pod for pod in self.view.pods if not pod.host_network and not pod.is_over]
        wanted = {pod.uid: pod.ips for pod in pods}
        found = await self._finder.find_all(wanted)
        for pod in pods:
            await self._remember_pod(pod, found.pop(pod.uid, None))
        log.info("pods remembered", pods=len(self.reconciler.enrolments))

    async def _remember_pod(self, pod: KubePod, netns: PodNetns | None) -> None:
        was_enrolled = pod.status == Redirection.ENABLED
        is_in = self.reconciler.verdict(pod).decision is Decision.IN
        if netns is None:
            if was_enrolled:
                self._keep(pod.uid)
            return
        enrolment = self.reconciler.adopt(pod, netns)
        # Rules in a pod that nobody annotated: an agent was killed at its work.
        if not is_in and pod.status is None and not await self._has_rules(netns):
            self.reconciler.disown(pod.uid)
        if was_enrolled:
            info = PodInfo(pod.name, pod.namespace, pod.service_account)
            try:
                self.proxies.remember(pod.uid, info, netns)
                enrolment.is_told = True
            except AgentError as exc:
                log.warning("pod not remembered", uid=pod.uid, error=str(exc))

    def _keep(self, uid: PodUid) -> None:
        try:
            self.proxies.keep(uid)
        except AgentError as exc:
            log.warning("pod not kept", uid=uid, error=str(exc))

    async def _has_rules(self, netns: PodNetns) -> bool:
        try:
            return await self._kernel.stamp(netns) is not None
        except RedirectError as exc:
            log.warning("rules not read", error=str(exc))
            return True

    async def _follow_proxies(self) -> None:
        """Look again at pods that no proxy serves, whenever a proxy came or went."""
        while True:
            await self.proxies.wait_change()
            self.metrics.proxies.set(self.proxies.connections)
            if self.proxies.is_ready:
                self.reconciler.mark(self._unserved())

    def _unserved(self) -> Iterable[PodUid]:
        served = self.proxies.is_served
        return [uid for uid in self.reconciler.enrolments if not served(uid)]

    async def _sweep(self, ours: FileIdentity | None) -> None:
        """Compare everything with what it should be, now and then."""
        path = self.config.zds_path
        while True:
            await trio.sleep(self.config.reconcile_seconds)
            if identity_of(path) != ours:
                raise UsurpedError(f"another node agent has taken {path}; this one steps back")
            self.reconciler.mark_all()
            try:
                if self._probes.plan is not None:
                    self._probes.plan = await self._host_plan()
                await self._probes.ensure()
            except RedirectError as exc:
                log.warning("probe rule not verified", error=str(exc))

    def _done(self, what: str) -> None:
        self.waiting_for.discard(what)
        log.info("done waiting", what=what, left=len(self.waiting_for))


async def _serve_and_close(door: trio.socket.SocketType | UnixListener, routes: Routes) -> None:
    with door as listener:
        await serve(listener, routes)
