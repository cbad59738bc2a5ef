"""The demo's mesh with the reference's proxy on some of its nodes, or on none."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

import trio

from tests.support import peers
from ztunnel.devmesh.cluster import Node
from ztunnel.devmesh.kube_mesh import kube_mesh
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.node_proxy import NodeProxy, running_node_proxy

MANIFESTS = Path(str(files("ztunnel.devmesh").joinpath("demo.yaml")))
CART_B, LEDGER, VIP = "10.244.2.10", "10.244.2.11", "10.96.0.10"
APP, SINK, SOURCE = 8080, 8081, 8082


@asynccontextmanager
async def reference_mesh(
    *theirs: str, manifests: Path = MANIFESTS, **settings: str
) -> AsyncIterator[DevMesh]:
    """Run it, with applications, and theirs on these nodes.

    On failure prints what the proxies said; that none refused what it was told is asserted.
    """
    programs = {node: [os.environ["ZTUNNEL_REFERENCE"]] for node in theirs}
    prefix = f"zr{os.getpid()}"
    async with (
        kube_mesh(manifests, prefix=prefix, programs=programs, settings=settings) as (mesh, plane),
        trio.open_nursery() as nursery,
    ):
        for pod in (mesh.pods["cart-a"], mesh.pods["cart-b"], mesh.pods["ledger"]):
            for port, handler in ((APP, peers.echo), (SINK, peers.sink), (SOURCE, peers.source)):
                await nursery.start(peers.serve, handler, await mesh.listen(pod, port))
        try:
            yield mesh
        except BaseException:
            for name, proxy in mesh.proxies.items():
                print(f"--- {name}", *proxy.lines.all[-20:], sep="\n")  # noqa: T201
            raise
        assert plane.counts.refusals == []
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def successor(mesh: DevMesh, name: str, program: Sequence[str]) -> AsyncIterator[NodeProxy]:
    """Run a second proxy for a node, with the first one's environment and an address of its own.

    Begins the block once it serves the node's two pods.
    """
    first = mesh.proxies[name].process.pid
    variables = Path(f"/proc/{first}/environ").read_bytes().decode().split("\0")
    settings = dict(text.split("=", 1) for text in variables if text)
    host = mesh.cluster.add_outside(f"{name}-new", "203.0.113.77")
    async with running_node_proxy(
        host, agent_socket=mesh.sockets[name], settings=settings, program=program
    ) as proxy:
        with trio.fail_after(20):
            for pod in mesh.pods.values():
                if pod.node is mesh.nodes[name]:
                    await proxy.lines.wait_for("pod received", f'name="{pod.name}"', seconds=20)
        yield proxy


async def get(node: Node, port: int, path: str) -> bytes:
    """Get a page of a proxy."""
    sock = trio.socket.from_stdlib_socket(node.netns.call(socket.socket))
    await sock.connect(("127.0.0.1", port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        with trio.fail_after(10):
            head, _, body = (await peers.read_to_end(stream)).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"chunked" not in head
    return body
