"""A node with two pods that Kubernetes knows, our node agent, and a node proxy: ours or another."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import yaml

from cni.agent.app import Agent
from cni.agent.config import AgentConfig
from cni.agent.pod_netns import NodeView
from cni.plugin.event import announce
from tests.support import mesh, peers
from tests.support.kube import FakeKube, FakeProc, a_pod, running
from tests.support.ports import claimed_ports
from ztunnel.devmesh.ca_server import MeshCa, serving_ca
from ztunnel.devmesh.cluster import Cluster, Node, Pod
from ztunnel.devmesh.forward import forward
from ztunnel.devmesh.kube_mesh import ISTIOD_IP, ISTIOD_PORT, links
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.node_proxy import OURS, NodeProxy, running_node_proxy
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.workload import PodUid

APP = 8080
IPS = {"client": "10.244.1.10", "server": "10.244.1.11"}


def uid_of(name: str) -> PodUid:
    number = list(IPS).index(name) + 1
    return PodUid(f"{number}1111111-2222-3333-4444-555555555555")


@dataclass
class Scene:
    """A node with two pods, of which Kubernetes knows."""

    folder: Path
    cluster: Cluster
    node: Node
    kube: FakeKube
    proc: FakeProc
    pods: dict[str, Pod] = field(default_factory=dict)
    agent: Agent | None = None
    proxy: NodeProxy | None = None
    reference: str | None = None  # the proxy to run instead of ours
    authority: DevelopmentCa = field(default_factory=DevelopmentCa.create)

    @property
    def zds_path(self) -> Path:
        return self.folder / "z.sock"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def add_pod(self, name: str, *, runs: bool = True) -> Pod:
        """Make a pod, and a process in it if it runs."""
        ip = IPS[name]
        pod = self.pods[name] = self.cluster.add_pod(self.node, name, ip, v6(ip))
        if runs:
            self.proc.add(uid_of(name), pod.netns)
        return pod

    def announce(self, name: str, *, with_ip: bool = True) -> None:
        """Have Kubernetes know a pod."""
        addresses = {"ip": IPS[name], "ipv6": v6(IPS[name])} if with_ip else {"ip": None}
        self.kube.put(a_pod(name, uid=uid_of(name), account=name, **addresses))

    @asynccontextmanager
    async def running_agent(
        self, prepare: Callable[[Agent], None] = lambda _: None
    ) -> AsyncIterator[Agent]:
        """Run the node agent while the block runs; `prepare` may change it before."""
        assert self.kube.server is not None
        with claimed_ports(2, host="::") as (health_port, monitoring_port):
            config = AgentConfig(
                node_name="node",
                api=self.kube.server,
                run_dir=self.run_dir,
                zds_path=self.zds_path,
                probe_owner=0,
                health_port=health_port,
                monitoring_port=monitoring_port,
                reconcile_seconds=0.5,
            )
            view = NodeView(self.proc.root, (Path("/"),), self.node.netns.id)
            agent = Agent(config, host=self.node.netns, node=view, rng=random.Random(1))
            self.agent = agent
            prepare(agent)
            async with trio.open_nursery() as nursery:
                with trio.fail_after(15):
                    await nursery.start(agent.run)
                yield agent
                nursery.cancel_scope.cancel()

    def mesh_ca(self) -> AbstractContextManager[int]:
        """Serve the CA; the reference has no other way to get certificates."""
        return serving_ca(MeshCa(self.authority), hosts=[ISTIOD_IP])

    @asynccontextmanager
    async def running_proxy(self) -> AsyncIterator[NodeProxy]:
        """Run the node proxy while the block runs."""
        path = self.folder / "mesh.yaml"
        workloads = [mesh.a_pod(name, ip) for name, ip in IPS.items()]
        path.write_text(yaml.safe_dump({"workloads": workloads, "services": [], "policies": []}))
        async with running_node_proxy(
            self.node,
            config_path=path,
            agent_socket=self.zds_path,
            authority=None if self.reference else self.authority,
            settings=links(self.authority, "") | {"XDS_ADDRESS": ""} if self.reference else {},
            program=[self.reference] if self.reference else OURS,
        ) as proxy:
            self.proxy = proxy
            try:
                yield proxy
            except BaseException:
                sys.stdout.write("\n".join(["--- proxy", *proxy.lines.all[-30:], ""]))
                raise

    async def until(self, *names: str, status: str | None = "enabled") -> None:
        """Wait until Kubernetes says that of these pods."""
        await self.kube.until(lambda: all(self.kube.status(name) == status for name in names), 20)

    async def call(self, text: bytes = b"hello") -> trio.SocketStream:
        """Call the server from the client, through whatever is between; returns the connection."""
        stream = await self.connect()
        await stream.send_all(text)
        assert await peers.read_exactly(stream, len(text)) == text
        return stream

    async def connect(self) -> trio.SocketStream:
        return await DevMesh.connect(None, self.pods["client"], IPS["server"], APP)  # type: ignore[arg-type]

    async def plugin(self, name: str) -> None:
        """Do as the plugin does for a new sandbox."""
        pod = self.pods[name]
        path = f"/proc/{os.getpid()}/fd/{pod.netns.fileno()}"
        addresses = [
            {"Interface": 2, "Address": {"IP": str(ip), "Mask": "/////w=="}, "Gateway": ""}
            for ip in pod.addresses
        ]
        event = {"Netns": path, "PodName": name, "PodNamespace": "shop", "IPs": addresses}
        body = json.dumps({**event, "PodUID": uid_of(name), "ContainerID": "c"}).encode()
        await trio.to_thread.run_sync(
            lambda: announce(str(self.run_dir), body, netns=path), abandon_on_cancel=True
        )


def v6(ip: str) -> str:
    return f"fd00::{ip.replace('.', ':')}"


@asynccontextmanager
async def agent_scene(*, reference: str | None = None) -> AsyncIterator[Scene]:
    """Have a node with both pods, of which the second echoes; agent and proxy do not run yet."""
    folder = Path(tempfile.mkdtemp(prefix="agent"))  # a short path: it holds sockets
    try:
        (folder / "proc").mkdir()
        with Cluster() as cluster:
            async with running(FakeKube()) as kube:
                node = cluster.add_node("node-a")
                proc = FakeProc(folder / "proc")
                scene = Scene(folder, cluster, node, kube, proc, reference=reference)
                async with _populated(scene):
                    yield scene
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def _populated(scene: Scene) -> AsyncIterator[None]:
    scene.kube.label("shop", None)
    for name in IPS:
        scene.add_pod(name)
        scene.announce(name)
    with scene.mesh_ca() as port:
        async with trio.open_nursery() as nursery:
            server = scene.pods["server"]
            listener = await DevMesh.listen(None, server, APP)  # type: ignore[arg-type]
            await nursery.start(peers.serve, peers.echo, listener)
            istiod = scene.cluster.add_outside("istiod", ISTIOD_IP)
            ca = await DevMesh.listen(None, istiod, ISTIOD_PORT)  # type: ignore[arg-type]
            await nursery.start(forward, ca, port)
            yield
            nursery.cancel_scope.cancel()
