"""The demo's mesh with the reference's proxy on some of its nodes, or on none."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

import trio

from tests.support import peers
from ztunnel.devmesh.kube_mesh import kube_mesh
from ztunnel.devmesh.mesh import DevMesh

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
