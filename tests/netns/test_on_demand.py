"""On-demand mode in pods: the first connection to what the store lacks works, whatever it is."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest
import trio

from tests.support import peers
from ztunnel.devmesh.kube_mesh import kube_mesh
from ztunnel.devmesh.mesh import DevMesh

pytestmark = pytest.mark.netns

APP = 8080
CART_B, OUTSIDE = "10.244.2.10", "203.0.113.10"
VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"
MANIFESTS = Path(str(files("ztunnel.devmesh").joinpath("demo.yaml")))
ON_DEMAND = {"XDS_ON_DEMAND": "true", "ISTIO_META_DNS_CAPTURE": "false"}


async def hello(stream: trio.SocketStream) -> None:
    """Say something once somebody asks."""
    async with stream:
        await stream.receive_some()
        await stream.send_all(b"hello")


async def ask(mesh: DevMesh, ip: str, port: int) -> bytes:
    async with await mesh.connect(mesh.pods["web"], ip, port) as stream:
        with trio.fail_after(10):
            await stream.send_all(b"?")
            return await peers.read_to_end(stream)


@pytest.mark.parametrize(("callers", "workers"), [(1, 1), (20, 1), (20, 2)])
@pytest.mark.parametrize(
    ("ip", "port", "tunnelled"),
    [
        pytest.param(CART_B, APP, True, id="pod IP"),
        pytest.param(VIP, 80, True, id="service VIP"),
        pytest.param(VIP6, 80, True, id="IPv6 VIP"),
        pytest.param(OUTSIDE, APP, False, id="nobody's"),
    ],
)
async def test_the_first_connections_find_what_was_not_known(
    ip: str, port: int, tunnelled: bool, callers: int, workers: int
) -> None:
    settings = {**ON_DEMAND, "ZTUNNEL_WORKER_THREADS": str(workers)}
    async with (
        kube_mesh(MANIFESTS, prefix=f"zt{os.getpid()}", settings=settings) as (mesh, _),
        trio.open_nursery() as nursery,
    ):
        servers = [mesh.pods["cart-a"], mesh.pods["cart-b"]]
        for member in (*servers, mesh.cluster.add_outside("internet", OUTSIDE)):
            await nursery.start(peers.serve, hello, await mesh.listen(member, APP))
        answers = []

        async def call() -> None:
            answers.append(await ask(mesh, ip, port))

        async with trio.open_nursery() as calls:
            for _ in range(callers):
                calls.start_soon(call)
        assert answers == [b"hello"] * callers
        line = await mesh.proxies["node-a"].lines.wait_for(
            "connection complete", 'direction="outbound"', 'src.workload="web"'
        )
        assert ("dst.hbone_addr" in line) is tunnelled
        nursery.cancel_scope.cancel()
