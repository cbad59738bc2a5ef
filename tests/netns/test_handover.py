"""Two node proxies on one node: a successor takes over without losing a connection."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.mesh import a_pod, running_mesh
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.node_proxy import NodeProxy, running_node_proxy

pytestmark = pytest.mark.netns

APP = 8080
SERVER = "10.244.2.10"
CONNECTIONS = 10_000
AT_ONCE = 16


def pods() -> list[object]:
    return [a_pod("client", "10.244.1.10"), a_pod("server", SERVER, node="node-b")]


class Caller:
    """Opens new connections one after another, many at once, and counts what came of them."""

    def __init__(self, mesh: DevMesh) -> None:
        self.mesh = mesh
        self.begun = 0
        self.done = 0
        self.failures: list[str] = []
        self.more = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(self._worker)

    async def _worker(self) -> None:
        while self.begun < CONNECTIONS:
            self.begun += 1
            try:
                await self._call()
            except (OSError, trio.BrokenResourceError, AssertionError) as error:
                self.failures.append(repr(error))
            self.done += 1
            self.more.set()

    async def _call(self) -> None:
        async with await self.mesh.connect(self.mesh.pods["client"], SERVER, APP) as stream:
            await stream.send_all(b"?")
            assert await stream.receive_some(1) == b"?"

    async def reached(self, number: int) -> None:
        while self.done < number:
            self.more = trio.Event()
            await self.more.wait()


async def replace(mesh: DevMesh, node: str, nursery: trio.Nursery) -> NodeProxy:
    """Start a second proxy for a node, and send the first away once the second serves the pods."""
    home = mesh.cluster.add_node(f"successor-{node}")  # on a cluster: the new pod's own namespace
    agent = mesh.agents[node]
    old = mesh.proxies[node]

    async def hold(task_status: trio.TaskStatus[NodeProxy]) -> None:
        async with running_node_proxy(
            home,
            config_path=mesh.path,
            agent_socket=mesh.sockets[node],
            authority=mesh.authority,
            settings={"NODE_NAME": node, "CONNECTION_TERMINATION_DEADLINE": "20s"},
        ) as proxy:
            task_status.started(proxy)
            await trio.sleep_forever()

    new = await nursery.start(hold)
    await new.lines.wait_for("readiness task done", "workload proxy manager", seconds=20)
    assert agent.connections == 2
    old.process.send_signal(signal.SIGTERM)
    with trio.fail_after(30):
        assert await old.process.wait() == 0
    return new


@pytest.mark.timeout(240)
async def test_no_new_connection_fails_while_both_nodes_change_their_proxy(tmp_path: Path) -> None:
    settings = {"CONNECTION_TERMINATION_DEADLINE": "20s", "RUST_LOG": "info,access=off"}
    async with running_mesh(tmp_path, pods(), **settings) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["server"], APP))
        caller = Caller(mesh)
        async with trio.open_nursery() as calls:
            calls.start_soon(caller.run)
            for number, node in enumerate(["node-a", "node-b"]):
                with trio.fail_after(100):
                    await caller.reached(CONNECTIONS * (number + 1) // 4)
                await replace(mesh, node, nursery)
        assert caller.failures == []
        assert caller.done == CONNECTIONS
        nursery.cancel_scope.cancel()
