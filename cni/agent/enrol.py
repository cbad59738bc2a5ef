"""One pod: into the mesh, and out of it (cni.md 3.5 and 3.6).

How it works: each step first looks whether it is needed, so the same script enrols a new pod,
repairs one in which something changed, and goes on where an agent that was killed left off. The
order is what keeps a pod safe at every point between: traffic is captured before anybody serves
it (and refused until then), and the annotation that makes peers use the tunnel comes last. Out
goes the other way round: the rules go before the proxy does. A pod whose namespace we cannot find
any more is not forgotten, as with the reference, but tried again until its rules are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import structlog

from cni.agent.errors import AgentError, NetnsError, NoProxyError, ProxyLostError, UnservedError
from cni.agent.metrics import AgentMetrics
from cni.agent.objects import KubePod, Redirection
from cni.redirect.errors import RedirectError
from cni.redirect.plan import RedirectPlan
from ztunnel.errors import ZtunnelError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo

STAMP_PREFIX = "ztunnel-cni pod "

log = structlog.get_logger(component="enrol")


class PodKernel(Protocol):
    """What is done inside a pod's namespace; every method may raise `RedirectError`."""

    async def inspect(self, netns: PodNetns, plan: RedirectPlan) -> list[str]:
        """Say in what the pod's rules and routes differ from the plan's."""

    async def apply(self, netns: PodNetns, plan: RedirectPlan, stamp: str) -> None:
        """Write rules and routes."""

    async def remove(self, netns: PodNetns) -> None:
        """Take rules and routes away."""

    async def stamp(self, netns: PodNetns) -> str | None:
        """Give the stamp of the rules in the pod; None if there are no rules."""

    async def silent_ports(self, netns: PodNetns) -> list[int]:
        """Give those of the proxy's ports at which nobody listens."""


class Spaces(Protocol):
    """How namespaces are found."""

    async def find(self, uid: PodUid, ips: Iterable[IpAddress]) -> PodNetns | None:
        """Find a pod's namespace; the caller closes it."""

    async def is_alive(self, netns: PodNetns) -> bool:
        """Whether the sandbox that the namespace was made for still is there."""


class Proxies(Protocol):
    """The node proxies (`ZdsServer`); methods may raise `AgentError`."""

    def is_served(self, uid: PodUid) -> bool:
        """Whether a proxy says that it serves the pod."""

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Have a pod served."""

    async def remove(self, uid: PodUid) -> None:
        """Have a pod no longer served."""


class Probes(Protocol):
    """The host's exemption for kubelet's probes; methods may raise `RedirectError`."""

    async def put(self, uid: PodUid, ips: Iterable[IpAddress]) -> None:
        """Exempt these addresses, and none else of this pod."""

    async def drop(self, uid: PodUid) -> None:
        """Exempt none of this pod's addresses."""


class Annotations(Protocol):
    """Where the outcome is published."""

    async def set(self, pod: KubePod, status: Redirection | None) -> bool:
        """Write the status annotation; False if the pod is gone. May raise `KubeError`."""


class State(StrEnum):
    """Where a pod is on its way."""

    WAITING = "waiting"  # nothing is done yet: its namespace is not known
    PENDING = "pending"  # something failed, or is not done yet
    ENROLLED = "enrolled"
    LEAVING = "leaving"


@dataclass(slots=True, kw_only=True)
class Enrolment:
    """What we have done for one pod; owned by whoever looks at the pod right now."""

    uid: PodUid
    namespace: str = ""  # of Kubernetes; both also when the pod is gone
    name: str = ""
    netns: PodNetns | None = None
    plan: RedirectPlan | None = None  # the one whose rules we wrote or found
    ips: tuple[IpAddress, ...] = ()
    is_told: bool = False  # proxies are told about this very namespace
    exempted: frozenset[IpAddress] = frozenset()
    state: State = State.WAITING
    reason: str = ""  # why it is not enrolled
    repairs: int = 0
    annotated: tuple[str, Redirection | None] | None = None  # at which version, what

    def shown(self, pod: KubePod) -> str | None:
        """Say what the annotation is, also while our own change has not come back yet."""
        if self.annotated is not None and self.annotated[0] == pod.version:
            return self.annotated[1]
        return pod.status

    def use(self, netns: PodNetns) -> None:
        """Take over a namespace; the one we had is closed."""
        self.let_go()
        self.netns = netns
        self.plan = None
        self.is_told = False

    def let_go(self) -> None:
        """Close the namespace."""
        if self.netns is not None:
            self.netns.close()
            self.netns = None


class Enroller:
    """Does it."""

    def __init__(
        self,
        *,
        kernel: PodKernel,
        spaces: Spaces,
        proxies: Proxies,
        probes: Probes,
        annotations: Annotations,
        metrics: AgentMetrics,
    ) -> None:
        self._kernel = kernel
        self._spaces = spaces
        self._proxies = proxies
        self._probes = probes
        self._annotations = annotations
        self._metrics = metrics

    async def enrol(self, pod: KubePod, plan: RedirectPlan, enrolment: Enrolment) -> None:
        """Make sure of everything that a pod in the mesh needs.

        Raises:
            ZtunnelError: a step failed; those before it are done.
        """
        failure: ZtunnelError | None = None
        try:
            netns = await self._have_netns(pod, enrolment)
            await self._have_rules(netns, plan, enrolment)
            await self._have_proxy(pod, netns, enrolment)
            await self._have_probes(enrolment)
            await self._publish(pod, enrolment, Redirection.ENABLED)
        except ZtunnelError as exc:
            failure = exc
        if failure is not None:
            if enrolment.state is not State.WAITING:
                enrolment.state = State.PENDING
            enrolment.reason = str(failure)
            await self._admit_failure(pod, enrolment, failure)
            raise failure
        if enrolment.state is not State.ENROLLED:
            log.info("pod enrolled", ns=pod.namespace, name=pod.name, uid=pod.uid)
        enrolment.state, enrolment.reason = State.ENROLLED, ""

    async def release(self, enrolment: Enrolment, pod: KubePod | None, *, lives: bool) -> None:
        """Take a pod out; `lives`: it goes on running, so its rules must go.

        Raises:
            ZtunnelError: a step failed; call again until it does not.
        """
        enrolment.state, enrolment.reason = State.LEAVING, ""
        try:
            await self._probes.drop(enrolment.uid)
            enrolment.exempted = frozenset()
            if lives:
                await self._clear_rules(enrolment)
            await self._proxies.remove(enrolment.uid)
            if pod is not None and enrolment.shown(pod) is not None:
                await self._publish(pod, enrolment, None)
        except ZtunnelError as exc:
            enrolment.reason = str(exc)
            raise
        enrolment.let_go()
        log.info("pod released", uid=enrolment.uid, lives=lives)

    async def withdraw(self, enrolment: Enrolment) -> None:
        """Forget a sandbox that the runtime tears down because we refused it."""
        try:
            await self._probes.drop(enrolment.uid)
            await self._proxies.remove(enrolment.uid)
        except (AgentError, RedirectError) as exc:
            # The next sandbox, or the pod's end, does it again.
            log.info("refused sandbox not forgotten", uid=enrolment.uid, error=str(exc))
        enrolment.let_go()
        enrolment.plan, enrolment.exempted = None, frozenset()
        enrolment.state = State.WAITING

    async def _have_netns(self, pod: KubePod, enrolment: Enrolment) -> PodNetns:
        held = enrolment.netns
        if held is not None and await self._spaces.is_alive(held):
            return held
        found = await self._spaces.find(pod.uid, enrolment.ips)
        if found is None:
            raise NetnsError("no process of the pod was found in a namespace with its address")
        if held is not None:
            self._repaired(enrolment, "the pod has another namespace")
        enrolment.use(found)
        return found

    async def _have_rules(self, netns: PodNetns, plan: RedirectPlan, enrolment: Enrolment) -> None:
        problems = await self._kernel.inspect(netns, plan)
        if problems:
            if enrolment.plan == plan:
                self._repaired(enrolment, "; ".join(problems[:3]))
            with self._metrics.timing_rules():
                await self._kernel.apply(netns, plan, STAMP_PREFIX + enrolment.uid)
            left = await self._kernel.inspect(netns, plan)
            if left:
                raise RedirectError(f"rules were written, but: {'; '.join(left[:3])}")
        enrolment.plan = plan
        if enrolment.state is State.WAITING:
            enrolment.state = State.PENDING

    async def _have_proxy(self, pod: KubePod, netns: PodNetns, enrolment: Enrolment) -> None:
        info = PodInfo(pod.name, pod.namespace, pod.service_account)
        if not (enrolment.is_told and self._proxies.is_served(pod.uid)):
            # Also if it fails: the next proxy hears of it in its snapshot.
            enrolment.is_told = True
            await self._proxies.add(pod.uid, info, netns)
        if not await self._kernel.silent_ports(netns):
            return
        # It acknowledged another namespace, or lost its listeners: begin anew.
        await self._proxies.remove(pod.uid)
        await self._proxies.add(pod.uid, info, netns)
        silent = await self._kernel.silent_ports(netns)
        if silent:
            ports = ", ".join(map(str, silent))
            raise UnservedError(f"the node proxy accepted the pod, but nobody listens at {ports}")

    async def _have_probes(self, enrolment: Enrolment) -> None:
        wanted = frozenset(enrolment.ips)
        if wanted != enrolment.exempted:
            await self._probes.put(enrolment.uid, wanted)
            enrolment.exempted = wanted

    async def _publish(
        self, pod: KubePod, enrolment: Enrolment, status: Redirection | None
    ) -> None:
        if enrolment.shown(pod) == status:
            return
        if await self._annotations.set(pod, status):
            enrolment.annotated = pod.version, status

    async def _admit_failure(
        self, pod: KubePod, enrolment: Enrolment, failure: ZtunnelError
    ) -> None:
        """Publish that a pod is not served, unless that says nothing new.

        A proxy that is away for a moment is no reason to make all peers change how they speak to
        this node's pods: what they send is refused until it is back.
        """
        enabled = enrolment.shown(pod) == Redirection.ENABLED
        proxy_away = isinstance(failure, NoProxyError | ProxyLostError)
        if (enabled and proxy_away) or not (enabled or enrolment.plan is not None):
            return
        try:
            await self._publish(pod, enrolment, Redirection.PENDING)
        except AgentError as exc:
            log.warning("annotation not written", uid=pod.uid, error=str(exc))

    async def _clear_rules(self, enrolment: Enrolment) -> None:
        netns = enrolment.netns
        if netns is None or not await self._spaces.is_alive(netns):
            found = await self._spaces.find(enrolment.uid, enrolment.ips)
            if found is None and netns is None:
                raise NetnsError("its namespace is not found, so its rules may still be there")
            if found is not None:
                enrolment.use(found)
        assert enrolment.netns is not None
        await self._kernel.remove(enrolment.netns)

    def _repaired(self, enrolment: Enrolment, what: str) -> None:
        enrolment.repairs += 1
        self._metrics.repairs.add()
        log.warning("pod repaired", uid=enrolment.uid, what=what)
