"""A whole mesh on one machine: cluster, enrolled pods, one real node proxy per node.

Built from one static configuration: each workload in it becomes a pod on its node. HBONE
ones are enrolled, unless they speak it themselves (`nativeTunnel`). Here stands what on a cluster
the node agent does: redirect a pod, then hand its namespace to the node's proxy.
"""

from __future__ import annotations

import socket
import tempfile
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from cni.agent.errors import ProxyLostError
from cni.agent.zds_server import ZdsServer, serve_zds
from cni.redirect.apply import apply_redirect
from cni.redirect.plan import RedirectPlan
from ztunnel.devmesh.cluster import Cluster, Member, Node, Pod
from ztunnel.devmesh.node_proxy import NodeProxy, explain_death, running_node_proxy
from ztunnel.errors import ConfigError, ResourceError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.workload import PodUid, TunnelProtocol
from ztunnel.wire.zds import PodInfo
from ztunnel.xds.local import parse_local_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from ztunnel.model.network import IpAddress
    from ztunnel.model.workload import Workload
    from ztunnel.state.store import Update

DEATH_SECONDS = 1.0  # how long to wait for the status of a proxy that hung up on us
READY_SECONDS = 15.0
CONNECT_SECONDS = 5.0


class StartProxy(Protocol):
    """Runs a node's proxy for the length of a block."""

    def __call__(self, node: Node, *, agent_socket: Path) -> AbstractAsyncContextManager[NodeProxy]:
        """Start it."""


@dataclass(slots=True)
class DevMesh:
    """A running mesh."""

    cluster: Cluster
    config: Update
    authority: DevelopmentCa
    path: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    outside: dict[str, Member] = field(default_factory=dict)
    proxies: dict[str, NodeProxy] = field(default_factory=dict)
    agents: dict[str, ZdsServer] = field(default_factory=dict)
    sockets: dict[str, Path] = field(default_factory=dict)

    async def enrol(self, workload: Workload, plan: RedirectPlan | None = None) -> None:
        """Redirect the pod of `workload` and have it served.

        Raises:
            ZtunnelError: the kernel or the proxy refused.
        """
        pod = self.pods[workload.name]
        await trio.to_thread.run_sync(apply_redirect, pod.netns, plan or RedirectPlan(dns=True))
        info = PodInfo(workload.name, workload.namespace, workload.service_account)
        try:
            await self.agents[pod.node.name].add(pod_uid(workload), info, pod.netns)
        except ProxyLostError as error:
            lost = error
        else:
            return
        proxy = self.proxies[pod.node.name]
        with trio.move_on_after(DEATH_SECONDS):
            await proxy.process.wait()
            raise explain_death(proxy)
        raise lost

    async def listen(self, member: Member, port: int) -> trio.SocketListener:
        """Listen on a port of every address of a pod or host."""
        sock = member.netns.call(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener = trio.socket.from_stdlib_socket(sock)
        await listener.bind(("::", port))
        listener.listen(128)
        return trio.SocketListener(listener)

    async def connect(self, member: Member, ip: IpAddress | str, port: int) -> trio.SocketStream:
        """Connect as a program inside a pod or host would.

        Raises:
            OSError: refused, unreachable, or no answer in time.
        """
        family = socket.AF_INET6 if ":" in str(ip) else socket.AF_INET
        sock = member.netns.call(lambda: socket.socket(family, socket.SOCK_STREAM))
        stream = trio.socket.from_stdlib_socket(sock)
        try:
            with trio.fail_after(CONNECT_SECONDS):
                await stream.connect((str(ip), port))
        except trio.TooSlowError:
            stream.close()
            raise TimeoutError(f"no answer from {ip} port {port}") from None
        except BaseException:
            stream.close()
            raise
        return trio.SocketStream(stream)


def pod_uid(workload: Workload) -> PodUid:
    """Name a pod as its node agent does."""
    return PodUid(f"{workload.namespace}-{workload.name}-0000")


def load(path: Path) -> Update:
    """Read the configuration of a mesh.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong (line and field named).
    """
    try:
        return parse_local_config(path.read_text(encoding="utf-8"), source=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ResourceError as error:
        raise ConfigError(str(error)) from error


@asynccontextmanager
async def dev_mesh(
    path: Path,
    *,
    prefix: str = "ztdemo",
    keep: bool = False,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[DevMesh]:
    """Build the mesh of a static configuration; everything is gone when the block ends.

    Raises:
        ZtunnelError: it could not be built; the message says what and why.
        OSError: the kernel refused something that no message of ours covers.
    """
    config = load(path)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{prefix}-")))
        cluster = stack.enter_context(Cluster(prefix, keep=keep))
        mesh = DevMesh(cluster, config, DevelopmentCa.create(), path)
        start = partial(
            running_node_proxy, config_path=path, authority=mesh.authority, settings=settings
        )
        await populate(mesh, folder, stack, start)
        yield mesh


async def populate(mesh: DevMesh, folder: Path, stack: AsyncExitStack, start: StartProxy) -> None:
    """Make pods and nodes, start a proxy on each node, and enrol the pods.

    Raises:
        ZtunnelError: it could not be done; the message says what and why.
    """
    for workload in mesh.config.workloads:
        add_pod(mesh, workload)
    for name, node in mesh.nodes.items():
        agent_socket = mesh.sockets[name] = folder / f"{name}.sock"
        mesh.agents[name] = await stack.enter_async_context(serve_zds(str(agent_socket)))
        running = start(node, agent_socket=agent_socket)
        mesh.proxies[name] = await stack.enter_async_context(running)
    await wait_ready(mesh)
    for workload in mesh.config.workloads:
        if workload.protocol is TunnelProtocol.HBONE and not workload.native_tunnel:
            await mesh.enrol(workload)


def add_pod(mesh: DevMesh, workload: Workload) -> None:
    """Make the pod of a workload, and its node if that is new."""
    if workload.node not in mesh.nodes:
        mesh.nodes[workload.node] = mesh.cluster.add_node(workload.node)
    v4 = next((str(ip) for ip in workload.ips if isinstance(ip, IPv4Address)), None)
    v6 = next((str(ip) for ip in workload.ips if isinstance(ip, IPv6Address)), None)
    if v4 is None:
        raise ConfigError(f"workload {workload.uid}: a pod needs an IPv4 address")
    mesh.pods[workload.name] = mesh.cluster.add_pod(
        mesh.nodes[workload.node], workload.name, v4, v6
    )


async def wait_ready(mesh: DevMesh) -> None:
    """Wait until every node's proxy is connected to its agent.

    Raises:
        ConfigError: one of them ended, or did not come in time.
    """

    async def connected(name: str) -> None:
        proxy = mesh.proxies[name]
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await proxy.process.wait()
                raise explain_death(proxy)

            nursery.start_soon(watch)
            with trio.move_on_after(READY_SECONDS) as scope:
                await mesh.agents[name].wait_connected()
            if scope.cancelled_caught:
                raise ConfigError(f"the node proxy of {name} did not connect in {READY_SECONDS} s")
            nursery.cancel_scope.cancel(reason="connected")

    async with trio.open_nursery() as nursery:
        for name in mesh.proxies:
            nursery.start_soon(connected, name)
