"""Real Envoy on the other end, both ways, with redirection and real node proxies in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.envoy import running_envoy
from tests.support.envoy_config import HboneClient, HboneServer
from tests.support.mesh import a_pod, call_refused, credentials, namespace_file, running_mesh

pytestmark = [pytest.mark.netns, pytest.mark.interop]

APP = 8080
ENVOY_ID = "spiffe://cluster.local/ns/shop/sa/envoy"
CART_ID = "spiffe://cluster.local/ns/shop/sa/cart"


def pods() -> list[object]:
    return [
        a_pod("cart", "10.244.1.10"),
        a_pod("envoy", "10.244.2.10", node="node-b", nativeTunnel=True),
    ]


@pytest.mark.parametrize("own_records", ["true", "false"])
async def test_envoy_calls_a_pod_of_ours(
    tmp_path: Path, envoy_program: Path, own_records: str
) -> None:
    async with (
        running_mesh(tmp_path, pods(), ZTUNNEL_OWN_RECORDS=own_records) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["cart"], APP))
        client = HboneClient(
            credentials=credentials(mesh, ENVOY_ID),
            hbone_address="10.244.1.10",
            hbone_port=15008,
            authority=f"10.244.1.10:{APP}",
            expected_identity=CART_ID,
        )
        where = namespace_file(mesh.pods["envoy"])
        async with running_envoy(client, program=envoy_program, netns=where) as envoy:

            async def connect() -> trio.SocketStream:
                return await mesh.connect(mesh.pods["envoy"], "127.0.0.1", envoy.port)

            await peers.echo_and_check(connect, streams=16, size=300_000)
        line = await mesh.proxies["node-a"].lines.wait_for(ENVOY_ID, 'direction="inbound"')
        assert f"dst.hbone_addr=10.244.1.10:{APP}" in line
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("own_records", ["true", "false"])
async def test_a_pod_of_ours_calls_envoy(
    tmp_path: Path, envoy_program: Path, own_records: str
) -> None:
    async with (
        running_mesh(tmp_path, pods(), ZTUNNEL_OWN_RECORDS=own_records) as mesh,
        trio.open_nursery() as nursery,
    ):
        envoy_pod = mesh.pods["envoy"]
        await nursery.start(peers.serve, peers.echo, await mesh.listen(envoy_pod, APP))
        server = HboneServer(
            credentials=credentials(mesh, ENVOY_ID),
            accepted_identities=CART_ID,
            listen_address="0.0.0.0",
            listen_port=15008,
        )
        async with running_envoy(
            server, program=envoy_program, netns=namespace_file(envoy_pod)
        ) as envoy:

            async def connect() -> trio.SocketStream:
                return await mesh.connect(mesh.pods["cart"], "10.244.2.10", APP)

            await peers.echo_and_check(connect, streams=16, size=300_000)
            entries = await envoy.access_log(lines=16)
            assert {entry["authority"] for entry in entries} == {f"10.244.2.10:{APP}"}
            assert {entry["peer"] for entry in entries} == {CART_ID}
            assert all(entry["forwarded"].startswith('for="10.244.1.10:') for entry in entries)
        nursery.cancel_scope.cancel()


async def test_envoy_with_another_identity_than_expected_is_refused(
    tmp_path: Path, envoy_program: Path
) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        server = HboneServer(
            credentials=credentials(mesh, "spiffe://cluster.local/ns/shop/sa/impostor"),
            listen_address="0.0.0.0",
            listen_port=15008,
        )
        where = namespace_file(mesh.pods["envoy"])
        async with running_envoy(server, program=envoy_program, netns=where):
            assert await call_refused(mesh, "cart", "10.244.2.10", APP)
        line = await mesh.proxies["node-a"].lines.wait_for("did not present the expected SAN")
        assert "impostor" in line
        assert 'reason="identity_mismatch"' in line
