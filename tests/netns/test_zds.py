from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from cni.agent.errors import ProxyRefusedError
from cni.agent.zds_server import serve_zds
from cni.redirect.apply import apply_redirect
from cni.redirect.plan import RedirectPlan
from tests.support.namespaces import accept, connect, echoed, needs_root
from ztunnel.devmesh.cluster import Cluster
from ztunnel.inpod.zds import AgentLink, LinkState
from ztunnel.linux import sockopt
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import Endpoint
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo

pytestmark = [pytest.mark.netns, needs_root]

INFO = PodInfo("pod", Namespace("shop"), ServiceAccount("default"))
A = PodUid("a")


@dataclass
class Proxy:
    """Listens for outbound connections inside each pod, as the real one does."""

    listeners: dict[PodUid, socket.socket] = field(default_factory=dict)

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        await trio.lowlevel.checkpoint()
        listener = netns.call(lambda: socket.socket(socket.AF_INET6))
        try:
            sockopt.set_mark(listener, 0x539)
            listener.bind(("::", 15001))
        except OSError:
            listener.close()
            raise
        listener.listen()
        listener.settimeout(5)
        netns.close()
        self.listeners[uid] = listener

    async def remove(self, uid: PodUid) -> None:
        await trio.lowlevel.checkpoint()
        self.listeners.pop(uid).close()

    async def reconcile(self, keep: frozenset[PodUid]) -> None:
        for uid in self.listeners.keys() - keep:
            await self.remove(uid)


@pytest.fixture
def path() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp())  # shorter than tmp_path: socket paths have 107 bytes
    yield str(folder / "zds.sock")
    shutil.rmtree(folder)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def ignore(state: LinkState) -> None:
    """Nobody looks at readiness here."""


async def test_an_enrolled_pods_traffic_reaches_the_proxy(path: str, cluster: Cluster) -> None:
    node = cluster.add_node("node")
    pod = cluster.add_pod(node, "pod", "10.1.0.1", "fd00:1::1")
    cluster.add_pod(node, "other", "10.1.0.2", "fd00:1::2")
    proxy = Proxy()
    with trio.fail_after(10):
        async with serve_zds(path) as agent, trio.open_nursery() as nursery:
            nursery.start_soon(AgentLink(path, proxy, on_state=ignore).run)
            await agent.wait_connected()
            await trio.to_thread.run_sync(apply_redirect, pod.netns, RedirectPlan())
            await agent.add(A, INFO, pod.netns)
            with (
                connect(pod.netns, "10.1.0.2", 80) as client,
                accept(proxy.listeners[A]) as caught,
            ):
                assert sockopt.original_destination(caught) == Endpoint.of(("10.1.0.2", 80))
                assert echoed(client, caught)
            await agent.remove(A)
            assert proxy.listeners == {}
            with pytest.raises(ConnectionRefusedError):
                connect(pod.netns, "10.1.0.2", 80)
            nursery.cancel_scope.cancel()


async def test_a_taken_port_refuses_the_pod_until_it_is_free(path: str, cluster: Cluster) -> None:
    pod = cluster.add_pod(cluster.add_node("node"), "pod", "10.1.0.1")
    proxy = Proxy()
    pending, served = trio.Event(), trio.Event()

    def on_state(state: LinkState) -> None:
        (pending if state.pending else served).set()

    link = AgentLink(path, proxy, on_state=on_state, retry_seconds=0.05)
    with trio.fail_after(10), ExitStack() as stack:
        intruder = stack.enter_context(pod.netns.call(lambda: socket.socket(socket.AF_INET6)))
        intruder.bind(("::", 15001))
        async with serve_zds(path) as agent, trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            await agent.wait_connected()
            with pytest.raises(ProxyRefusedError, match="Address already in use"):
                await agent.add(A, INFO, pod.netns)
            await pending.wait()
            served = trio.Event()
            intruder.close()
            await served.wait()
            stack.enter_context(proxy.listeners[A])
            nursery.cancel_scope.cancel()
