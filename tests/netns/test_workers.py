"""Several data-path processes on a node: seen from outside they are one proxy."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import yaml

from tests.support import peers
from tests.support.mesh import a_pod, call_refused, running_mesh
from tests.support.operators import READINESS, dump, http, metrics, total
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.node_proxy import NodeProxy

pytestmark = pytest.mark.netns

APP = 8080
SERVER = "10.244.2.10"
HELD = 40  # that all of them fall to one of two workers has a probability of 2**-39
SECONDS = 25
LINE = re.compile(r"[0-9T:.-]+Z\t(trace|debug|info|warn|error)\t[^\t]+\t[^\t]+\t[^\t]*")


class Scene:
    """A client and a server pod on two nodes, and connections between them that are held."""

    def __init__(self, mesh: DevMesh, folder: Path) -> None:
        self.mesh = mesh
        self.path = folder / "mesh.yaml"
        self.client = mesh.proxies["node-a"]
        self.server = mesh.proxies["node-b"]
        self.held: list[trio.SocketStream] = []

    async def call(self) -> trio.SocketStream:
        stream = await self.mesh.connect(self.mesh.pods["client"], SERVER, APP)
        if not await answers(stream):
            await stream.aclose()
            raise ConnectionResetError("no echo")
        return stream

    async def hold(self, count: int) -> None:
        for _ in range(count):
            self.held.append(await self.call())

    async def drop(self) -> None:
        while self.held:
            await trio.aclose_forcefully(self.held.pop())


async def answers(stream: trio.SocketStream) -> bool:
    with trio.fail_after(SECONDS):
        try:
            await stream.send_all(b"?")
            return await stream.receive_some(1) == b"?"
        except trio.BrokenResourceError:
            return False


@asynccontextmanager
async def a_scene(folder: Path, **settings: str) -> AsyncIterator[Scene]:
    pods = [a_pod("client", "10.244.1.10"), a_pod("server", SERVER, node="node-b")]
    settings = {"ZTUNNEL_WORKER_THREADS": "2", **settings}
    async with running_mesh(folder, pods, **settings) as mesh, trio.open_nursery() as nursery:
        app = await mesh.listen(mesh.pods["server"], APP)
        nursery.start_soon(peers.serve, peers.echo, app)
        scene = Scene(mesh, folder)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(scene.drop)
            yield scene
        nursery.cancel_scope.cancel()


def workers_of(proxy: NodeProxy) -> list[int]:
    pid = proxy.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def listeners(scene: Scene, pod: str) -> dict[int, int]:
    """Count the listening sockets of a pod by port."""
    text = scene.mesh.pods[pod].netns.call(
        lambda: (
            Path("/proc/thread-self/net/tcp6").read_text()
            + Path("/proc/thread-self/net/tcp").read_text()
        )
    )
    found: dict[int, int] = {}
    for line in text.splitlines():
        _, local, _, state, *_ = line.split()
        if state == "0A":
            port = int(local.rpartition(":")[2], 16)
            found[port] = found.get(port, 0) + 1
    return found


async def until(holds: Callable[[], bool], *, seconds: float = SECONDS) -> None:
    """Wait for something no event tells about."""
    with trio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def connections(scene: Scene, node: str, side: str) -> int:
    state = (await dump(scene.mesh.nodes[node], "workloadState"))["workloadState"]
    return sum(len(pod["connections"][side]) for pod in state.values())


async def test_operators_see_one_proxy_whose_connections_are_spread(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        await scene.hold(HELD)
        for node, side in (("node-a", "outbound"), ("node-b", "inbound")):
            assert await connections(scene, node, side) == HELD
        samples = await metrics(scene.mesh.nodes["node-a"])
        opened = [
            total(samples, "ztunnel_worker_connections_opened_total", f'worker="{number}"')
            for number in range(2)
        ]
        assert min(opened) > 0
        assert sum(opened) == HELD
        assert total(samples, "istio_tcp_connections_opened_total") == HELD
        assert total(samples, "istio_tcp_sockets_open", 'reporter="source"') == HELD
        assert total(samples, "workload_manager_active_proxy_count") == 1
        assert total(samples, "workload_manager_proxies_started_total") == 1
        assert total(samples, "istio_build") == 1
        status, _ = await http(scene.mesh.nodes["node-a"], READINESS, "GET /healthz/ready")
        assert status == "HTTP/1.1 200 OK"
        certificates = await dump(scene.mesh.nodes["node-a"], "certificates")
        assert [one["state"] for one in certificates["certificates"]] == ["Available"]


async def test_log_lines_of_all_workers_are_whole_and_obey_one_level(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        await scene.hold(HELD)
        await scene.drop()
        lines = scene.client.lines
        await until(lambda: sum("connection complete" in line for line in lines.all) == HELD)
        assert [line for line in lines.all if not LINE.fullmatch(line)] == []

        node = scene.mesh.nodes["node-a"]
        status, _ = await http(node, 15000, "POST /logging?level=access=off")
        assert status == "HTTP/1.1 200 OK"
        await scene.hold(HELD)
        await scene.drop()
        while await connections(scene, "node-a", "outbound"):  # noqa: ASYNC110 - no event tells
            await trio.sleep(0.02)
        await http(node, 15000, "POST /logging?reset")
        await scene.hold(1)
        await scene.drop()
        await until(lambda: sum("connection complete" in line for line in lines.all) > HELD)
        assert sum("connection complete" in line for line in lines.all) == HELD + 1


async def test_a_worker_that_is_killed_is_replaced_and_the_others_go_on(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        node, control = scene.mesh.nodes["node-a"], scene.client.process.pid
        agent = scene.mesh.agents["node-a"]
        await scene.hold(1)  # certificates are there, and tunnels
        await scene.drop()
        before = await metrics(node)
        bound = listeners(scene, "client")
        assert {bound[port] for port in (15001, 15006, 15008, 15053)} == {
            2,
            4,
        }  # DNS on two addresses
        files, victims = open_files(control), workers_of(scene.client)
        assert len(victims) == 2
        await scene.hold(HELD)
        held = await metrics(node)
        of_second = total(held, "ztunnel_worker_connections_opened_total")
        since = len(scene.client.lines.all)

        os.kill(victims[0], signal.SIGKILL)
        await scene.client.lines.wait_for("worker ended", "killed by SIGKILL", since=since)
        alive = [stream for stream in scene.held if await answers(stream)]
        assert 0 < len(alive) < HELD
        for _ in range(HELD):  # the one that is left takes all of them
            await trio.aclose_forcefully(await scene.call())
        assert agent.connections == 1

        await scene.client.lines.wait_for("worker ready", since=since, seconds=SECONDS)
        await until(lambda: listeners(scene, "client") == bound)
        await scene.hold(HELD)
        after = await metrics(node)
        assert total(after, "ztunnel_worker_restarts_total") == 1
        assert total(after, "ztunnel_worker_up") == 2
        assert of_second <= total(after, "istio_tcp_connections_opened_total")
        for name, value in before.items():
            if "_total" in name or "_bucket" in name:
                assert after[name] >= value, name
        status, _ = await http(node, READINESS, "GET /healthz/ready")
        assert status == "HTTP/1.1 200 OK"
        assert scene.client.lines.find("node agent not reachable") is None

        await scene.drop()
        assert set(victims) & set(workers_of(scene.client)) == {victims[1]}
        await until(lambda: open_files(control) <= files)
        assert len(workers_of(scene.client)) == 2


async def test_a_node_without_workers_is_not_ready_until_it_has_some_again(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        node, since = scene.mesh.nodes["node-a"], len(scene.client.lines.all)
        bound = listeners(scene, "client")
        for pid in workers_of(scene.client):
            os.kill(pid, signal.SIGKILL)
        pending = ("HTTP/1.1 500 Internal Server Error", b"not ready, pending: workers\n")
        answers_seen: list[tuple[str, bytes]] = []
        with trio.fail_after(SECONDS):
            while pending not in answers_seen or answers_seen[-1][0] != "HTTP/1.1 200 OK":
                answers_seen.append(await http(node, READINESS, "GET /healthz/ready"))
                await trio.sleep(0.02)
        for number in range(2):
            ready = f"worker ready\tworker={number}"
            await scene.client.lines.wait_for(ready, since=since, seconds=SECONDS)
        await until(lambda: listeners(scene, "client") == bound)
        await scene.hold(5)
        assert scene.mesh.agents["node-a"].connections == 1


async def test_new_connections_succeed_while_workers_are_killed_one_by_one(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        failures: list[float] = []
        done = 0
        stop = trio.Event()

        async def calls() -> None:
            nonlocal done
            while not stop.is_set():
                began = trio.current_time()
                try:
                    await trio.aclose_forcefully(await scene.call())
                except OSError:
                    failures.append(began)
                done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(calls)
            kills = []
            bound = listeners(scene, "client")
            for _ in range(3):
                reached = done + 100
                await until(lambda reached=reached: done >= reached)
                kills.append(trio.current_time())
                os.kill(workers_of(scene.client)[0], signal.SIGKILL)
                await until(lambda: listeners(scene, "client") != bound)
                await until(lambda: listeners(scene, "client") == bound)
            stop.set()
        # What was under way in it fails with it, and nothing that began later.
        assert all(any(kill - 2 < began < kill + 0.5 for kill in kills) for began in failures)
        assert len(failures) <= 8 * len(kills)


async def test_a_change_of_policy_closes_connections_in_all_workers(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        await scene.hold(HELD)
        document = yaml.safe_load(scene.path.read_text())
        caller = {"principals": [{"Exact": "cluster.local/ns/shop/sa/client"}]}
        document["policies"] = [
            {
                "name": "no-client", "namespace": "shop", "scope": "Namespace",
                "action": "Deny", "dryRun": False, "rules": [[[caller]]],
            }
        ]  # fmt: skip
        scene.path.write_text(yaml.safe_dump(document))
        for stream in scene.held:
            with trio.fail_after(SECONDS), pytest.raises((trio.BrokenResourceError, EOFError)):
                await peers.read_exactly(stream, 1)
        for _ in range(10):
            assert await call_refused(scene.mesh, "client", SERVER, APP)


async def test_sigterm_drains_all_workers(tmp_path: Path) -> None:
    async with a_scene(tmp_path, CONNECTION_TERMINATION_DEADLINE="30s") as scene:
        await scene.hold(HELD)
        workers = workers_of(scene.client)
        scene.client.process.send_signal(signal.SIGTERM)
        await scene.client.lines.wait_for("draining")
        await until(lambda: 15001 not in listeners(scene, "client"))
        assert all([await answers(stream) for stream in scene.held])
        while scene.held:
            await scene.held.pop().aclose()
        with trio.fail_after(SECONDS):
            assert await scene.client.process.wait() == 0
        assert all(gone(pid) for pid in workers)
        lines = scene.client.lines.all
        assert sum("connection complete" in line for line in lines) == HELD
        assert scene.client.lines.find("worker ended") is None


async def test_no_worker_outlives_the_control_process(tmp_path: Path) -> None:
    async with a_scene(tmp_path) as scene:
        await scene.hold(HELD)
        workers = workers_of(scene.client)
        scene.client.process.kill()
        await until(lambda: all(gone(pid) for pid in workers), seconds=5)
        await until(lambda: 15001 not in listeners(scene, "client"))
        assert not any([await answers(stream) for stream in scene.held])
