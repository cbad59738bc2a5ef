"""A node as the enrolment of pods sees it: kernel, proxies, probe sets, annotations, all in memory.

It outlives the agent, which may be killed at any call, before or after what the call does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from cni.agent.agenda import Agenda
from cni.agent.eligibility import Eligibility
from cni.agent.enrol import Enroller
from cni.agent.errors import NoProxyError
from cni.agent.metrics import AgentMetrics
from cni.agent.mirror import Changed, Removed
from cni.agent.objects import STATUS_ANNOTATION, KubeNamespace, KubePod, NamespaceUid, Redirection
from cni.agent.overrides import Redirecting
from cni.agent.reconcile import Reconciler
from cni.agent.selectors import MODE_LABEL
from cni.agent.view import ClusterView
from cni.redirect.plan import RedirectPlan
from ztunnel.errors import ZtunnelError
from ztunnel.linux.netns import NetnsId, PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import IpAddress, parse_ip
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo

SHOP = Namespace("shop")
A = PodUid("a")


class KilledError(BaseException):
    """The agent's process is no more."""


def a_kube_pod(uid: str = "a", **more: object) -> KubePod:
    """A pod in the namespace `shop`."""
    facts: dict[str, object] = {
        "uid": PodUid(uid),
        "name": uid,
        "namespace": SHOP,
        "service_account": ServiceAccount("default"),
        "ips": (parse_ip("10.1.0.1"),),
        "version": "1",
    }
    return KubePod(**(facts | more))  # type: ignore[arg-type]  # named by the test


@dataclass
class World:
    """What is there. `fail` raises that error at each call of that name."""

    folder: Path
    pods: dict[PodUid, KubePod] = field(default_factory=dict)
    spaces: dict[PodUid, Path] = field(default_factory=dict)
    dead: set[NetnsId] = field(default_factory=set)
    rules: dict[NetnsId, tuple[RedirectPlan, str]] = field(default_factory=dict)
    served: dict[PodUid, NetnsId] = field(default_factory=dict)
    exempted: dict[IpAddress, PodUid] = field(default_factory=dict)
    has_proxy: bool = True
    listens: bool = True
    mesh: bool = True  # the namespace is labelled
    fail: dict[str, ZtunnelError] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    kill_at: int | None = None  # the number of a call, from 1
    kill_after: bool = False  # what the call does is done

    def add_pod(self, pod: KubePod, *, runs: bool = True) -> KubePod:
        """Have a pod, with a namespace if it runs."""
        self.pods[pod.uid] = pod
        if runs:
            self.new_space(pod.uid).close()
        return pod

    def new_space(self, uid: PodUid) -> PodNetns:
        """Give a pod another sandbox; returns a holder of its namespace."""
        path = self.folder / f"{uid}-{len(list(self.folder.iterdir()))}"
        path.touch()
        self.spaces[uid] = path
        return PodNetns.open(path)

    def space(self, uid: PodUid) -> NetnsId:
        """Say which namespace is a pod's."""
        with PodNetns.open(self.spaces[uid]) as netns:
            return netns.id

    # What the enroller calls.

    async def inspect(self, netns: PodNetns, plan: RedirectPlan) -> list[str]:
        await self._call("inspect")
        found = self.rules.get(netns.id)
        return [] if found is not None and found[0] == plan else ["rules differ"]

    async def apply(self, netns: PodNetns, plan: RedirectPlan, stamp: str) -> None:
        await self._call("apply", lambda: self.rules.update({netns.id: (plan, stamp)}))

    async def remove_rules(self, netns: PodNetns) -> None:
        await self._call("remove rules", lambda: self.rules.pop(netns.id, None))

    async def stamp(self, netns: PodNetns) -> str | None:
        await self._call("stamp")
        found = self.rules.get(netns.id)
        return found[1] if found else None

    async def silent_ports(self, netns: PodNetns) -> list[int]:
        await self._call("silent ports")
        return [] if self.listens else [15001]

    async def find(self, uid: PodUid, ips: Iterable[IpAddress]) -> PodNetns | None:
        await self._call("find")
        return PodNetns.open(self.spaces[uid]) if uid in self.spaces else None

    async def is_alive(self, netns: PodNetns) -> bool:
        await self._call("is alive")
        return netns.id not in self.dead

    def is_served(self, uid: PodUid) -> bool:
        return uid in self.served

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        await self._call("add")
        if not self.has_proxy:
            raise NoProxyError("no node proxy is connected")
        await self._call("ack", lambda: self.served.update({uid: netns.id}))

    async def remove(self, uid: PodUid) -> None:
        await self._call("delete", lambda: self.served.pop(uid, None))

    async def put(self, uid: PodUid, ips: Iterable[IpAddress]) -> None:
        def act() -> None:
            self._drop(uid)
            self.exempted.update(dict.fromkeys(ips, uid))

        await self._call("put", act)

    async def drop(self, uid: PodUid) -> None:
        await self._call("drop", lambda: self._drop(uid))

    async def set(self, pod: KubePod, status: Redirection | None) -> bool:
        def act() -> None:
            known = self.pods[pod.uid]
            annotations = {**known.annotations}
            annotations.pop(STATUS_ANNOTATION, None)
            if status is not None:
                annotations[STATUS_ANNOTATION] = status.value
            version = str(int(known.version) + 1)
            self.pods[pod.uid] = replace(known, annotations=annotations, version=version)

        if pod.uid not in self.pods:
            return False
        await self._call(f"annotate {status}", act)
        return True

    def _drop(self, uid: PodUid) -> None:
        self.exempted = {ip: owner for ip, owner in self.exempted.items() if owner != uid}

    async def _call(self, name: str, act: object = None) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(name)
        dies = len(self.calls) == self.kill_at
        if dies and not self.kill_after:
            raise KilledError
        if name in self.fail:
            raise self.fail[name]
        if callable(act):
            act()
        if dies:
            raise KilledError

    def status(self, uid: PodUid = A) -> str | None:
        """What the annotation says."""
        return self.pods[uid].status

    def is_enrolled(self, uid: PodUid = A, plan: RedirectPlan | None = None) -> bool:
        """Whether all is as it should be for a pod in the mesh."""
        space = self.space(uid)
        found = self.rules.get(space)
        return (
            found is not None
            and found[0] == (plan or RedirectPlan())
            and self.served.get(uid) == space
            and all(self.exempted.get(ip) == uid for ip in self.pods[uid].ips)
            and self.status(uid) == "enabled"
        )

    def is_untouched(self, uid: PodUid = A) -> bool:
        """Whether nothing is left of having been in the mesh."""
        return (
            self.space(uid) not in self.rules
            and uid not in self.served
            and uid not in self.exempted.values()
            and self.status(uid) is None
        )


class _Kernel:
    """The part of the world that has a name in common with another part."""

    def __init__(self, world: World) -> None:
        self.inspect = world.inspect
        self.apply = world.apply
        self.remove = world.remove_rules
        self.stamp = world.stamp
        self.silent_ports = world.silent_ports


class Agent:
    """The deciding part of a node agent, in a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.view = ClusterView()
        self.metrics = AgentMetrics()
        self.enroller = Enroller(
            kernel=_Kernel(world),
            spaces=world,
            proxies=world,
            probes=world,
            annotations=world,
            metrics=self.metrics,
        )
        self.reconciler = Reconciler(
            view=self.view,
            eligibility=Eligibility(),
            redirecting=Redirecting(),
            enroller=self.enroller,
            agenda=Agenda(random.Random(1)),
            metrics=self.metrics,
        )
        self._known: dict[PodUid, KubePod] = {}
        self.learn()

    def learn(self) -> None:
        """Hear from Kubernetes whatever there is to hear."""
        labels = {MODE_LABEL: "ambient"} if self.world.mesh else {}
        namespace = KubeNamespace(uid=NamespaceUid("ns"), name=SHOP, labels=labels)
        self.reconciler.namespaces_changed([Changed(namespace, None)])
        pods = dict(self.world.pods)
        self.reconciler.pods_changed(
            [
                Changed(pod, self._known.get(uid))
                for uid, pod in pods.items()
                if self._known.get(uid) != pod
            ]
        )
        gone = [pod for uid, pod in self._known.items() if uid not in pods]
        self.reconciler.pods_changed([Removed(pod) for pod in gone])
        self._known = pods

    async def start(self) -> None:
        """Do as the real one at its start: find what an earlier one left."""
        for pod in self.world.pods.values():
            netns = await self.world.find(pod.uid, pod.ips)
            if netns is None:
                continue
            self.reconciler.adopt(pod, netns)
            if pod.status is None and await self.world.stamp(netns) is None:
                self.reconciler.disown(pod.uid)
        self.reconciler.mark_all()

    async def settle(self) -> None:
        """Look at everything that is due, hearing each time what changed by it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reconciler.run)
            for _ in range(3):
                await self.reconciler.wait_idle()
                self.learn()
            await self.reconciler.wait_idle()
            nursery.cancel_scope.cancel()
