"""The reference's ztunnel on one node and ours on the other, HBONE between them, both ways.

Runs when ZTUNNEL_REFERENCE is the path of that program, which no registry has. One control plane
and one CA, both ours, serve both proxies; our node agent's ZDS tells both of their pods.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio

from tests.support import peers
from tests.support.kube import eventually
from tests.support.mesh import call_refused
from tests.support.reference_mesh import (
    APP,
    CART_B,
    LEDGER,
    SINK,
    SOURCE,
    VIP,
    reference_mesh,
    successor,
)
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.node_proxy import OURS

pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    pytest.mark.reference("ZTUNNEL_REFERENCE"),
]

STREAMS = 16
MEGABYTES_20 = 20 * 1024 * 1024
WEB = 'src.identity="spiffe://cluster.local/ns/shop/sa/web"'
CART = 'dst.identity="spiffe://cluster.local/ns/shop/sa/cart"'
AGAIN = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: bank}
spec:
  selector: {matchLabels: {app: ledger}}
  action: DENY
  rules: [{from: [{source: {namespaces: [shop]}}]}]
"""


@pytest.fixture(params=["node-a", "node-b"], ids=["they call us", "we call them"])
def theirs(request: pytest.FixtureRequest) -> str:
    """The node that the reference's proxy runs on; `web`, which calls, is on node-a."""
    return str(request.param)


def lines_of(mesh: DevMesh, node: str, direction: str) -> list[str]:
    return [
        line
        for line in mesh.proxies[node].lines.all
        if "connection complete" in line and f'direction="{direction}"' in line
    ]


async def echoed(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    with trio.fail_after(5):
        assert await peers.read_exactly(stream, len(data)) == data


async def until_ended(mesh: DevMesh, count: int) -> tuple[list[str], list[str]]:
    """Wait until both proxies have written a line for each of `count` connections."""
    with trio.fail_after(10):
        while True:
            found = lines_of(mesh, "node-a", "outbound"), lines_of(mesh, "node-b", "inbound")
            if min(map(len, found)) >= count:
                return found
            await trio.sleep(0.02)


async def test_bytes_and_half_closes_pass_and_streams_share_one_connection(theirs: str) -> None:
    async with reference_mesh(theirs) as mesh:
        web = mesh.pods["web"]
        with trio.fail_after(30):
            await peers.echo_and_check(partial(mesh.connect, web, CART_B, APP), streams=STREAMS)
            await peers.upload_and_check(partial(mesh.connect, web, CART_B, SINK))
            await peers.download_and_check(partial(mesh.connect, web, CART_B, SOURCE))
        sent, taken = await until_ended(mesh, STREAMS + 2)
        for line in (*sent, *taken):
            assert WEB in line
            assert CART in line
            assert f"dst.addr={CART_B}:15008 dst.hbone_addr={CART_B}:80" in line
            assert "error=" not in line
        assert len({re.search(r"src.addr=\S+", line)[0] for line in taken}) == 1


async def test_large_transfers_pass_both_ways_at_once(theirs: str) -> None:
    async with reference_mesh(theirs) as mesh:
        web = mesh.pods["web"]
        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                up = partial(peers.upload_and_check, partial(mesh.connect, web, CART_B, SINK))
                down = partial(peers.download_and_check, partial(mesh.connect, web, CART_B, SOURCE))
                nursery.start_soon(partial(up, size=MEGABYTES_20))
                nursery.start_soon(partial(down, size=MEGABYTES_20))
        sent, taken = await until_ended(mesh, 2)
        assert not [line for line in (*sent, *taken) if "error=" in line]


async def test_a_service_and_both_families_are_reached(theirs: str) -> None:
    async with reference_mesh(theirs) as mesh:
        for ip in ("fd00:10:244:2::10", VIP, "fd00:10:96::10"):
            port = APP if "244" in ip else 80
            with trio.fail_after(10):
                connect = partial(mesh.connect, mesh.pods["web"], ip, port)
                await peers.echo_and_check(connect, streams=8, size=10_000)


async def test_the_server_refuses_whom_a_policy_denies_and_both_say_so(theirs: str) -> None:
    async with reference_mesh(theirs) as mesh:
        assert await call_refused(mesh, "web", LEDGER, APP)
        ([sent], [taken]) = await until_ended(mesh, 1)
        assert 'error="http status: 401 Unauthorized"' in sent
        assert "policy rejection: explicitly denied by: bank/no-web" in taken


async def test_a_policy_that_changes_cuts_what_runs(theirs: str) -> None:
    async with reference_mesh(theirs) as mesh:
        async with await mesh.connect(mesh.pods["cart-a"], LEDGER, APP) as stream:
            await echoed(stream, b"ping")
            text = mesh.path.read_text()
            one = next(part for part in text.split("---") if "name: no-web" in part)
            mesh.path.write_text(text.replace(one, AGAIN.removeprefix("\n---")))
            with trio.fail_after(10):
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
        await until_ended(mesh, 1)


async def test_a_server_that_drains_ends_its_streams_and_its_client_says_so(theirs: str) -> None:
    async with reference_mesh(theirs, CONNECTION_TERMINATION_DEADLINE="2s") as mesh:
        async with await mesh.connect(mesh.pods["web"], CART_B, APP) as stream:
            await echoed(stream, b"ping")
            mesh.proxies["node-b"].process.terminate()
            await trio.sleep(0.5)
            # Told to leave, it goes on with the streams it has until its time is over.
            await echoed(stream, b"pong")
            with trio.fail_after(10):
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
        with trio.fail_after(10):
            assert await mesh.proxies["node-b"].process.wait() == 0
        await mesh.proxies["node-a"].lines.wait_for("connection complete", 'direction="outbound"')


async def test_a_client_that_drains_lets_its_streams_end(theirs: str) -> None:
    async with reference_mesh(theirs, CONNECTION_TERMINATION_DEADLINE="20s") as mesh:
        async with await mesh.connect(mesh.pods["web"], CART_B, APP) as stream:
            await echoed(stream, b"ping")
            mesh.proxies["node-a"].process.terminate()
            await echoed(stream, b"pong")
            await stream.send_eof()
            with trio.fail_after(5):
                assert await peers.read_to_end(stream) == b""
        with trio.fail_after(10):
            assert await mesh.proxies["node-a"].process.wait() == 0
        line = await mesh.proxies["node-b"].lines.wait_for("connection complete", "inbound")
        assert "bytes_sent=8 bytes_recv=8" in line


@dataclass
class Calls:
    """Calls from web to cart-b, one after the other."""

    mesh: DevMesh
    answered: int = 0
    enough: bool = False
    over: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        while not self.enough:
            async with await self.mesh.connect(self.mesh.pods["web"], CART_B, APP) as stream:
                await echoed(stream, b"ping")
                self.answered += 1
        self.over.set()

    async def end(self) -> None:
        """Let twenty more be answered, and the last one end."""
        seen = self.answered
        await eventually(lambda: self.answered >= seen + 20)
        self.enough = True
        with trio.fail_after(10):
            await self.over.wait()


@pytest.mark.parametrize("node", ["node-a", "node-b"], ids=["the client's", "the server's"])
@pytest.mark.parametrize("before", ["theirs", "ours"])
async def test_a_node_goes_from_one_proxy_to_the_other_and_no_call_fails(
    node: str, before: str
) -> None:
    theirs = [os.environ["ZTUNNEL_REFERENCE"]]
    first = {node} if before == "theirs" else set()
    async with (
        reference_mesh(*first, CONNECTION_TERMINATION_DEADLINE="3s") as mesh,
        trio.open_nursery() as nursery,
    ):
        calls = Calls(mesh)
        nursery.start_soon(calls.run)
        async with successor(mesh, node, OURS if before == "theirs" else theirs) as proxy:
            mesh.proxies[node].process.terminate()
            with trio.fail_after(10):
                assert await mesh.proxies[node].process.wait() == 0
            await calls.end()
            assert proxy.lines.find("connection complete") is not None
