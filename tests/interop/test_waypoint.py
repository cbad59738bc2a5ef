"""Envoy as the waypoint of a service: our client, Envoy, our server, HBONE on both legs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support import peers, web
from tests.support.envoy import Envoy, running_envoy
from tests.support.envoy_config import WAYPOINT_HEADER, Waypoint
from tests.support.mesh import HOST, a_pod, call_refused, credentials, namespace_file, running_mesh
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [pytest.mark.netns, pytest.mark.interop]

WEB, CART, WAYPOINT, VIP = "10.244.1.10", "10.244.2.10", "10.244.3.10", "10.96.0.1"
WEB_ID = "spiffe://cluster.local/ns/shop/sa/web"
CART_ID = "spiffe://cluster.local/ns/shop/sa/cart"
WAYPOINT_ID = "spiffe://cluster.local/ns/shop/sa/waypoint"
APP = 8080
STREAMS = 12


def pods() -> list[object]:
    return [
        a_pod("web", WEB),
        a_pod("cart", CART, node="node-b", services={f"shop/{HOST}": {80: APP}}),
        a_pod("waypoint", WAYPOINT, node="node-b", nativeTunnel=True),
    ]


SERVICES = [
    {
        "name": "cart",
        "namespace": "shop",
        "hostname": HOST,
        "vips": [f"/{VIP}"],
        "ports": {80: APP},
        "waypoint": {"destination": f"/{WAYPOINT}", "hboneMtlsPort": 15008},
    }
]


def a_waypoint(mesh: DevMesh, *, speaks_http: bool) -> Waypoint:
    return Waypoint(
        credentials=credentials(mesh, WAYPOINT_ID),
        hbone_address=CART,
        authority=f"{CART}:{APP}",
        expected_identity=CART_ID,
        accepted_identities=WEB_ID,
        speaks_http=speaks_http,
    )


async def assert_first_leg_is_logged(mesh: DevMesh, envoy: Envoy) -> None:
    """Check what the calling pod's proxy and Envoy have written down."""
    with trio.fail_after(10):
        entries = await envoy.access_log(lines=STREAMS)
    assert {entry["authority"] for entry in entries} == {f"{VIP}:80"}
    assert {entry["peer"] for entry in entries} == {WEB_ID}
    assert {entry["code"] for entry in entries} == {"200"}
    line = await mesh.proxies["node-a"].lines.wait_for("connection complete", f"{VIP}:80")
    assert f"dst.addr={WAYPOINT}:15008" in line
    assert f'dst.identity="{WAYPOINT_ID}"' in line
    assert "error=" not in line


async def assert_second_leg_is_logged(mesh: DevMesh) -> None:
    """Check what the called pod's proxy has written down, once Envoy is gone."""
    line = await mesh.proxies["node-b"].lines.wait_for("connection complete", f"{CART}:{APP}")
    assert f'src.identity="{WAYPOINT_ID}"' in line
    assert f'dst.service="{HOST}"' in line


async def test_bytes_and_half_closes_pass_a_waypoint(tmp_path: Path, envoy_program: Path) -> None:
    async with (
        running_mesh(tmp_path, pods(), SERVICES) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["cart"], APP))
        where = namespace_file(mesh.pods["waypoint"])
        config = a_waypoint(mesh, speaks_http=False)
        async with running_envoy(config, program=envoy_program, netns=where) as envoy:
            connect = partial(mesh.connect, mesh.pods["web"], VIP, 80)
            with trio.fail_after(20):
                await peers.echo_and_check(connect, streams=STREAMS, size=200_000)
            await assert_first_leg_is_logged(mesh, envoy)
        await assert_second_leg_is_logged(mesh)
        nursery.cancel_scope.cancel()


async def test_a_waypoint_sees_the_requests(tmp_path: Path, envoy_program: Path) -> None:
    async def ask(mesh: DevMesh, seed: int) -> None:
        body = peers.random_bytes(100_000, seed=seed)
        async with await mesh.connect(mesh.pods["web"], VIP, 80) as stream:
            head, answer = await web.post(stream, body)
            assert f"{WAYPOINT_HEADER}: seen".encode() in head.lower()
            assert answer == body
            await stream.send_eof()
            assert await peers.read_to_end(stream) == b""

    async with (
        running_mesh(tmp_path, pods(), SERVICES) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(peers.serve, web.serve_http, await mesh.listen(mesh.pods["cart"], APP))
        where = namespace_file(mesh.pods["waypoint"])
        config = a_waypoint(mesh, speaks_http=True)
        async with running_envoy(config, program=envoy_program, netns=where) as envoy:
            with trio.fail_after(20):
                async with trio.open_nursery() as calls:
                    for seed in range(STREAMS):
                        calls.start_soon(ask, mesh, seed)
            await assert_first_leg_is_logged(mesh, envoy)
        await assert_second_leg_is_logged(mesh)
        nursery.cancel_scope.cancel()


async def test_without_its_waypoint_a_service_is_not_reached(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods(), SERVICES) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["cart"], APP))
        assert await call_refused(mesh, "web", VIP, 80)
        line = await mesh.proxies["node-a"].lines.wait_for("error=", f"{VIP}:80")
        assert f"dst.addr={WAYPOINT}:15008" in line
        assert "Connection refused" in line
        nursery.cancel_scope.cancel()
