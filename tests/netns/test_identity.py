"""Node proxies with certificates of seconds, from a CA over gRPC, in real namespaces."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.ca import RunningCa, a_running_ca
from tests.support.certs import AUTHORITY, an_authority
from tests.support.mesh import a_pod, running_mesh
from ztunnel.devmesh.ca_server import CaFault
from ztunnel.devmesh.forward import forward
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [pytest.mark.netns, pytest.mark.slow]

APP, CA_PORT, CA_HOST = 8080, 15012, "203.0.113.9"
CLIENT, OTHER, SERVER = "10.244.1.10", "10.244.1.11", "10.244.2.10"
LIFETIME_SECONDS = 5
IDENTITIES = 3
FAILED = re.compile(r"\taccess\t.* error=")
REVOKED = 'error="connection closed: peer certificate revoked by CRL"'


@dataclass
class Scene:
    mesh: DevMesh
    running: RunningCa
    failures: list[str] = field(default_factory=list)
    calls: int = 0
    goes_on: bool = True

    async def call(self, pod: str) -> trio.SocketStream:
        stream = await self.mesh.connect(self.mesh.pods[pod], SERVER, APP)
        await stream.send_all(b"ping")
        assert await peers.read_exactly(stream, 4) == b"ping"
        return stream

    @asynccontextmanager
    async def steady_calls(self) -> AsyncIterator[None]:
        """Call from now to the end of the block, and then see that none failed."""
        self.goes_on = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._call_steadily)
            yield
            self.goes_on = False
        assert self.failures == []
        assert self.errors() == []

    async def _call_steadily(self) -> None:
        while self.goes_on:
            try:
                with trio.fail_after(5):
                    async with await self.call("client") as stream:
                        await stream.send_eof()
                        assert await peers.read_to_end(stream) == b""
            except (OSError, trio.BrokenResourceError, trio.TooSlowError, AssertionError) as exc:
                self.failures.append(f"call {self.calls}: {exc!r}")
            self.calls += 1
            await trio.sleep(0.03)

    async def renewals(self, number: int) -> None:
        """Wait until so many more certificates have been issued."""
        issued = self.running.ca.issued
        wanted = len(issued) + number
        with trio.fail_after(40):
            # The CA answers on threads of its own, which know no event of ours.
            while len(issued) < wanted:  # noqa: ASYNC110
                await trio.sleep(0.02)

    async def all_renewed(self) -> float:
        """Wait until each identity has a new certificate; return when the oldest was issued."""
        issued = self.running.ca.issued
        at: dict[str, float] = {}
        seen = len(issued)
        with trio.fail_after(40):
            while len(at) < IDENTITIES:
                await trio.sleep(0.02)
                fresh = list(issued)[seen:]
                at |= {name: trio.current_time() for name, _ in fresh}
                seen += len(fresh)
        return min(at.values())

    def errors(self) -> list[str]:
        proxies = self.mesh.proxies.values()
        return [line for proxy in proxies for line in proxy.lines.all if FAILED.search(line)]


@asynccontextmanager
async def a_scene(folder: Path, workers: int) -> AsyncIterator[Scene]:
    (folder / "root.pem").write_bytes(AUTHORITY.roots_pem)
    (folder / "token").write_text("a token \n")
    settings = {
        "FAKE_CA": "false",
        "CA_ADDRESS": f"https://{CA_HOST}:{CA_PORT}",
        "CA_ROOT_CA": str(folder / "root.pem"),
        "ALT_CA_HOSTNAME": "localhost",
        "AUTH_TOKEN": str(folder / "token"),
        "SECRET_TTL": f"{LIFETIME_SECONDS}s",
        "CRL_PATH": str(folder / "ca.crl"),
        "ZTUNNEL_WORKER_THREADS": str(workers),
    }
    pods = [
        a_pod("client", CLIENT),
        a_pod("other", OTHER),
        a_pod("server", SERVER, node="node-b"),
    ]
    async with (
        a_running_ca(an_authority(), token="a token") as running,
        running_mesh(folder, pods, **settings) as mesh,
        trio.open_nursery() as nursery,
    ):
        host = mesh.cluster.add_outside("ca", CA_HOST)
        await nursery.start(forward, await mesh.listen(host, CA_PORT), running.port)
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["server"], APP))
        scene = Scene(mesh, running)
        await scene.renewals(3)
        yield scene
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("workers", [1, 2])
async def test_short_lives_and_a_ca_that_is_down_for_most_of_one_cost_no_call(
    tmp_path: Path, workers: int
) -> None:
    async with a_scene(tmp_path, workers) as scene:
        ca = scene.running.ca
        oldest = await scene.all_renewed()
        ca.fault = CaFault.DOWN
        async with scene.steady_calls():
            # No longer than the oldest certificate lives, or nobody could live through it.
            await trio.sleep_until(oldest + 0.9 * LIFETIME_SECONDS)
            ca.fault = CaFault.NONE
            await scene.renewals(20)
    assert scene.calls > 50
    assert {call.cluster_id for call in ca.calls} == {"Kubernetes"}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_root_is_exchanged_and_a_revocation_cuts_exactly_the_right_tunnels(
    tmp_path: Path, workers: int
) -> None:
    async with a_scene(tmp_path, workers) as scene:
        ca = scene.running.ca
        ca.ttl_seconds_max = 2
        old, new = ca.authority, an_authority()
        async with scene.steady_calls():
            ca.authority = replace(old, other_roots=(new.root,))
            await scene.renewals(5)  # three identities; one may have begun before the change
            ca.authority = replace(new, other_roots=(old.root,))
            await scene.renewals(5)

        mine, others = await scene.call("client"), await scene.call("other")
        serials = [serial for name, serial in ca.issued if name.endswith("/sa/client")]
        lists = new.revoke(*serials) + old.revoke(*serials)
        (tmp_path / "ca.crl").write_bytes(lists)
        server = scene.mesh.proxies["node-b"].lines
        line = await server.wait_for("connection complete", REVOKED, seconds=8)
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
        with pytest.raises(trio.BrokenResourceError):
            await peers.read_to_end(mine)
        await others.send_all(b"more")
        assert await peers.read_exactly(others, 4) == b"more"
        await mine.aclose()
        await others.aclose()
