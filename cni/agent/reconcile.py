"""Wanted against actual, for all pods: at start, on every change, and periodically (cni.md 3.4).

How it works: whatever happens only marks pods; a look at a pod then compares what Kubernetes wants
with what is there, and does what is missing (`enrol`). So the order of events does not matter,
nor does a lost one: the next look puts it right. The agenda lets one look at a time at each pod,
and keeps pods from waiting for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import structlog
import trio
from structlog.contextvars import bind_contextvars

from cni.agent.agenda import Agenda
from cni.agent.eligibility import Decision, Eligibility, Verdict
from cni.agent.enrol import Enroller, Enrolment, State
from cni.agent.errors import AgentError, PodUnknownError
from cni.agent.metrics import AgentMetrics
from cni.agent.mirror import Change, Changed
from cni.agent.objects import KubeNamespace, KubePod
from cni.agent.overrides import Redirecting
from cni.agent.view import ClusterView
from ztunnel.errors import ZtunnelError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress
from ztunnel.model.workload import PodUid

UNSEEN_SECONDS = 60.0  # how far our watch may be behind the runtime
ENROLMENTS_MAX = 10_000  # far beyond what a node can run

log = structlog.get_logger(component="reconcile")


@dataclass(eq=False, slots=True)
class Offer:
    """A new sandbox, and whoever waits for what becomes of it; `done` is set in every outcome."""

    pod: KubePod
    netns: PodNetns | None  # ours until a look takes it
    ips: tuple[IpAddress, ...]
    done: trio.Event = field(default_factory=trio.Event)
    error: ZtunnelError | None = None

    def refuse(self, error: ZtunnelError) -> None:
        """End the offer."""
        self.error = error
        self.close()

    def close(self) -> None:
        """Let go of the namespace, if nobody took it, and wake whoever waits."""
        if self.netns is not None:
            self.netns.close()
            self.netns = None
        self.done.set()


class Reconciler:
    """Owns the enrolments."""

    def __init__(
        self,
        *,
        view: ClusterView,
        eligibility: Eligibility,
        redirecting: Redirecting,
        enroller: Enroller,
        agenda: Agenda,
        metrics: AgentMetrics,
    ) -> None:
        self.enrolments: dict[PodUid, Enrolment] = {}
        self._view = view
        self._eligibility = eligibility
        self._redirecting = redirecting
        self._enroller = enroller
        self._agenda = agenda
        self._metrics = metrics
        self._offers: dict[PodUid, Offer] = {}
        self._stirred = trio.Event()
        self._finished = trio.Event()
        self._looking: set[PodUid] = set()
        self._unseen: dict[PodUid, float] = {}  # enrolled before our watch told of them

    def verdict(self, pod: KubePod) -> Verdict:
        """Say whether a pod belongs into the mesh."""
        return self._eligibility.judge(pod, self._view.labels_of(pod.namespace))

    def pods_changed(self, changes: list[Change[KubePod]]) -> None:
        """Take what Kubernetes says about pods."""
        for change in changes:
            fresh = isinstance(change, Changed) and change.before is None
            kind = "delete" if not isinstance(change, Changed) else "add" if fresh else "update"
            self._metrics.events.count(kind).add()
        self.mark(self._view.take_pods(changes))

    def namespaces_changed(self, changes: list[Change[KubeNamespace]]) -> None:
        """Take what Kubernetes says about namespaces."""
        self.mark(self._view.take_namespaces(changes))

    def mark(self, uids: Iterable[PodUid]) -> None:
        """Have these pods looked at."""
        now = trio.current_time()
        for uid in uids:
            self._agenda.mark(uid, now)
        self._stir()

    def mark_all(self) -> None:
        """Have everything looked at that is, was or should be in the mesh."""
        wanted = {
            pod.uid
            for pod in self._view.pods
            if pod.status is not None or self.verdict(pod).decision is Decision.IN
        }
        self.mark(wanted | self.enrolments.keys())

    async def admit(self, offer: Offer) -> None:
        """Have a new sandbox enrolled; returns when it is.

        Raises:
            ZtunnelError: it is not; the runtime tears the sandbox down.
        """
        uid = offer.pod.uid
        older = self._offers.pop(uid, None)
        if older is not None:
            older.refuse(AgentError("the runtime has made another sandbox since"))
        self._offers[uid] = offer
        self.mark([uid])
        try:
            await offer.done.wait()
        finally:
            if self._offers.get(uid) is offer:  # nobody has taken it, and nobody waits any more
                del self._offers[uid]
                offer.close()
        if offer.error is not None:
            raise offer.error

    async def release_all(self) -> None:
        """Take all pods out of the mesh, and let none in any more; returns when that is done."""
        self._eligibility = replace(self._eligibility, enablements=())
        self.mark_all()
        while self.enrolments:
            await self._finished.wait()
        await self.wait_idle()

    async def run(self) -> None:
        """Look at what is marked, until cancelled."""
        try:
            async with trio.open_nursery() as looks:
                while True:
                    while (uid := self._agenda.take(trio.current_time())) is not None:
                        self._looking.add(uid)
                        looks.start_soon(self._look, uid)
                    self._stirred = trio.Event()
                    wake_at = self._agenda.wake_at()
                    with trio.move_on_at(float("inf") if wake_at is None else wake_at):
                        await self._stirred.wait()
        finally:
            for offer in self._offers.values():
                offer.refuse(AgentError("the node agent stops"))
            self._offers.clear()

    def close(self) -> None:
        """Let go of all namespaces; pods stay as they are."""
        for enrolment in self.enrolments.values():
            enrolment.let_go()

    async def wait_idle(self) -> None:
        """Wait until no look is due or under way; those that failed wait for their time."""
        while self._looking or self._is_due():
            await self._finished.wait()
        await trio.lowlevel.checkpoint()

    def _is_due(self) -> bool:
        wake_at = self._agenda.wake_at()
        return wake_at is not None and wake_at <= trio.current_time()

    async def _look(self, uid: PodUid) -> None:
        """Look at one pod. Only Cancelled escapes."""
        offer = self._offers.pop(uid, None)
        self._label_lines(uid, offer)
        succeeded = False
        try:
            await self._converge(uid, offer)
            succeeded = True
        except ZtunnelError as exc:
            await self._failed(uid, offer, exc)
            # A refused sandbox is torn down; the next one comes as an offer of its own.
            succeeded = offer is not None
        except Exception as exc:  # one pod's bug must not stop the others'
            log.exception("pod failed unexpectedly", uid=uid)
            self._metrics.failures.count("internal").add()
            if uid in self.enrolments:
                self.enrolments[uid].reason = f"internal error, see the log: {exc}"
            if offer is not None:
                offer.error = AgentError(f"internal error: {exc}")
        finally:
            if offer is not None:
                if not succeeded and offer.error is None:
                    offer.error = AgentError("the node agent stops")
                offer.close()
            self._looking.discard(uid)
            self._agenda.finish(uid, trio.current_time(), succeeded=succeeded)
            self._stir()
            self._finished.set()
            self._finished = trio.Event()

    def _label_lines(self, uid: PodUid, offer: Offer | None) -> None:
        """Have every line of this task, whoever writes it, say which pod it is about."""
        pod = self._view.pod(uid) or (offer.pod if offer is not None else None)
        known = pod or self.enrolments.get(uid)
        bind_contextvars(
            ns=known.namespace if known else None, name=known.name if known else None, uid=uid
        )

    async def _converge(self, uid: PodUid, offer: Offer | None) -> None:
        pod = self._view.pod(uid)
        if pod is not None:
            self._unseen.pop(uid, None)
        elif offer is not None:
            pod = offer.pod
            self._unseen[uid] = trio.current_time()
        if pod is None:
            if trio.current_time() > self._unseen.get(uid, -UNSEEN_SECONDS) + UNSEEN_SECONDS:
                self._unseen.pop(uid, None)
                await self._release(uid, None, lives=False)
            return
        verdict = self.verdict(pod)
        belongs = verdict.decision.value
        log.debug("look at pod", belongs=belongs)
        match verdict.decision:
            case Decision.IN:
                await self._enrol(pod, offer)
            case Decision.OUT:
                await self._release(uid, pod, lives=not pod.is_over)
            case Decision.UNKNOWN:
                if offer is not None:
                    raise PodUnknownError(f"namespace {pod.namespace} is not known yet")

    async def _enrol(self, pod: KubePod, offer: Offer | None) -> None:
        enrolment = self._enrolment(pod)
        if offer is not None:
            self._take(offer, enrolment)
        if enrolment.netns is None and not enrolment.ips:
            # It has not started: the plugin will tell. Without an address we cannot look for it.
            enrolment.reason = "not started yet"
            return
        plan, warnings = self._redirecting.plan_for(pod)
        for warning in warnings:
            log.warning("annotation ignored", ns=pod.namespace, name=pod.name, what=warning)
        await self._enroller.enrol(pod, plan, enrolment)

    def _take(self, offer: Offer, enrolment: Enrolment) -> None:
        netns, offer.netns = offer.netns, None
        assert netns is not None
        if enrolment.netns is not None and enrolment.netns.id == netns.id:
            netns.close()
        else:
            enrolment.use(netns)
            enrolment.state = State.WAITING
        enrolment.ips = offer.ips or enrolment.ips

    async def _release(self, uid: PodUid, pod: KubePod | None, *, lives: bool) -> None:
        enrolment = self.enrolments.get(uid)
        if enrolment is None:
            if pod is None or pod.status is None or pod.host_network:
                return
            enrolment = self._enrolment(pod)
        await self._enroller.release(enrolment, pod, lives=lives)
        del self.enrolments[uid]
        self.count()

    async def _failed(self, uid: PodUid, offer: Offer | None, error: ZtunnelError) -> None:
        self._metrics.failures.count(error.reason).add()
        enrolment = self.enrolments.get(uid)
        if offer is not None:
            offer.error = error
            if enrolment is not None:
                await self._enroller.withdraw(enrolment)
        failures = self._agenda.failures(uid)
        # A failing pod says so once, and again whenever that has become twice as often.
        report = log.warning if failures & (failures - 1) == 0 else log.debug
        report("pod not converged", uid=uid, reason=error.reason, error=str(error))

    def _enrolment(self, pod: KubePod) -> Enrolment:
        enrolment = self.enrolments.get(pod.uid)
        if enrolment is None:
            if len(self.enrolments) >= ENROLMENTS_MAX:
                raise AgentError(f"more than {ENROLMENTS_MAX} pods")
            enrolment = self.enrolments[pod.uid] = Enrolment(uid=pod.uid)
        enrolment.namespace, enrolment.name = pod.namespace, pod.name
        enrolment.ips = pod.ips or enrolment.ips
        return enrolment

    def adopt(self, pod: KubePod, netns: PodNetns) -> Enrolment:
        """Begin with a pod whose namespace was found before the first look; takes `netns`."""
        enrolment = self._enrolment(pod)
        enrolment.use(netns)
        return enrolment

    def disown(self, uid: PodUid) -> None:
        """Forget a pod in which there is nothing of ours."""
        self.enrolments.pop(uid).let_go()

    def count(self) -> None:
        """Bring the gauges up to date."""
        states = [enrolment.state for enrolment in self.enrolments.values()]
        for state in State:
            self._metrics.pods(state).set(states.count(state))

    def _stir(self) -> None:
        self._stirred.set()
