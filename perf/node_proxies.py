"""Proxies that honour the reference's environment: ours, and whatever `--peer` names.

One process per node with one pod each, fed as a cluster feeds it: pods by the node agent's ZDS,
certificates by a CA over gRPC, workloads and policies by the static configuration. Metrics, policy
and access log (to a file) are on, the original source address is kept.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from cni.agent.zds_server import ZdsServer, serve_zds
from perf.authority import PORT as AUTHORITY_PORT
from perf.contender import (
    POLL_SECONDS,
    READY_SECONDS,
    ContenderError,
    Running,
    Wish,
    process_in,
    tail,
    wait_until_it_answers,
)
from perf.mesh_file import NAMESPACE, NODES, write_mesh
from perf.plane import PORT as PLANE_PORT, READY
from perf.track import Track
from ztunnel.devmesh.cluster import Member, new_namespace
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo

ROOT = Path(__file__).parents[1]
OURS = (sys.executable, "-m", "ztunnel")
PASSED_ON = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
PLANE_LOG = "plane.log"
SOON = "1s"  # unused tunnels are dropped then, where none is used twice


class NodeProxies:
    """A program run as `<program> proxy ztunnel`, twice."""

    def __init__(
        self,
        name: str,
        words: tuple[str, ...] = OURS,
        settings: Mapping[str, str] | None = None,
        profiled: Mapping[str, tuple[str, ...]] | None = None,
        tree: Path = ROOT,
    ) -> None:
        """`tree` is the checkout that a Python program finds its modules in.

        `profiled` gives other words for a node's process, by its name in `NODES`.
        """
        self.name = name
        self.words = words
        self._settings = dict(settings or {})
        self._profiled = dict(profiled or {})
        self._tree = tree

    @property
    def is_ours(self) -> bool:
        """Whether it is our program, of whatever checkout."""
        return self.words == OURS

    def with_client(self, words: tuple[str, ...]) -> NodeProxies:
        """Make the same, but for the words that run the client's proxy."""
        under = {NODES[0]: words}
        return NodeProxies(self.name, self.words, self._settings, under, self._tree)

    @asynccontextmanager
    async def running(
        self, track: Track, wish: Wish, authority: DevelopmentCa, folder: Path
    ) -> AsyncIterator[Running | None]:
        """Run both, with the two pods enrolled."""
        logs = [folder / f"{name}.log" for name in NODES]
        pods = (("client", track.client), ("server", track.server))
        async with AsyncExitStack() as stack:
            for node in track.nodes:
                await stack.enter_async_context(running_authority(node, authority, folder))
            plane = None
            if wish.plane:
                starting_plane = running_plane(track.nodes[0], wish.plane, authority, folder)
                plane = await stack.enter_async_context(starting_plane)
            began = time.perf_counter()
            up = []
            for name, node in zip(NODES, track.nodes, strict=True):
                starting = self.node(name, node, wish, authority, folder)
                up.append(await stack.enter_async_context(starting))
            for proxy, (name, pod) in zip(up, pods, strict=True):
                await proxy.enrol(name, pod.netns)
            for number in range(wish.enrolled):
                await up[0].enrol(f"pod-{number}", stack.enter_context(new_namespace()))
            running = Running(up[0].process, up[1].process)
            await wait_until_it_answers(track, running, logs)
            seconds = time.perf_counter() - began
            yield Running(running.client, running.server, ready_seconds=seconds, plane=plane)

    @asynccontextmanager
    async def node(
        self, name: str, member: Member, wish: Wish, authority: DevelopmentCa, folder: Path
    ) -> AsyncIterator[NodeProxy]:
        """Run one of them, with an agent that knows no pods yet; its CA must be there."""
        mesh, roots, log = folder / "mesh.json", folder / "roots.pem", folder / f"{name}.log"
        if not mesh.exists():
            write_mesh(mesh, wish)
            roots.write_bytes(authority.roots_pem)
        async with serve_zds(str(folder / f"{name}.sock")) as agent:
            env = self._environment(name, folder, wish)
            words = [*self._profiled.get(name, self.words), "proxy", "ztunnel"]
            async with process_in(member, words, log, env=env) as process:
                yield NodeProxy(agent, process, log)

    def _environment(self, name: str, folder: Path, wish: Wish) -> dict[str, str]:
        plane = f"https://localhost:{PLANE_PORT}"
        return {
            **{key: os.environ[key] for key in PASSED_ON if key in os.environ},
            "PYTHONPATH": str(self._tree),
            "PYTHONSAFEPATH": "1",  # else the folder we are called from would come first
            "NODE_NAME": name,
            "INPOD_UDS": str(folder / f"{name}.sock"),
            "LOCAL_XDS_PATH": str(folder / "mesh.json"),
            "XDS_ADDRESS": plane if wish.plane and name == NODES[0] else "",
            "XDS_ROOT_CA": str(folder / "roots.pem"),
            "CA_ADDRESS": f"https://localhost:{AUTHORITY_PORT}",
            "CA_ROOT_CA": str(folder / "roots.pem"),
            "CLUSTER_ID": "bench",
            "RUST_LOG": "info",
            "ISTIO_META_DNS_CAPTURE": "false",
            "ZTUNNEL_WORKER_THREADS": "1",
            "CONNECTION_TERMINATION_DEADLINE": "1s",
            **({"POOL_UNUSED_RELEASE_TIMEOUT": SOON} if wish.tunnel_per_connection else {}),
            **({"ZTUNNEL_TLS_RESUMPTION": "true"} if wish.resumption else {}),
            **self._settings,
            **dict(wish.settings),
        }


@dataclass(frozen=True, slots=True)
class NodeProxy:
    """One process and the agent it obeys."""

    agent: ZdsServer
    process: trio.Process
    log: Path

    async def enrol(self, name: str, pod: PodNetns) -> None:
        """Have a pod served.

        Raises:
            ContenderError: the process ended, or did not come in time.
        """
        with trio.move_on_after(READY_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                await self.agent.wait_connected()
                await self.agent.add(PodUid(f"{NAMESPACE}-{name}"), info(name), pod)
                nursery.cancel_scope.cancel(reason="enrolled")
        if scope.cancelled_caught:
            raise ContenderError(f"a node proxy did not take its pod:\n{tail(self.log)}")

    async def _watch(self) -> None:
        await self.process.wait()
        raise ContenderError(f"a node proxy ended at once:\n{tail(self.log)}")


def info(name: str) -> PodInfo:
    """Say who a pod of the bench is."""
    return PodInfo(name, Namespace(NAMESPACE), ServiceAccount(name))


@asynccontextmanager
async def running_authority(
    node: Member, authority: DevelopmentCa, folder: Path
) -> AsyncIterator[None]:
    """Run the certificate authority inside a node."""
    words = [sys.executable, "-m", "perf.authority"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / "authority.log"
    async with process_in(node, words, log, env=env, stdin=authority.to_pem()) as process:
        with trio.move_on_after(READY_SECONDS):
            # No event of ours tells when another process listens.
            while process.poll() is None and not await _accepts(node, AUTHORITY_PORT):  # noqa: ASYNC110
                await trio.sleep(POLL_SECONDS)
        if process.poll() is not None:
            raise ContenderError(f"the certificate authority ended:\n{tail(log)}")
        yield


@asynccontextmanager
async def running_plane(
    node: Member, sizes: tuple[int, int, int], authority: DevelopmentCa, folder: Path
) -> AsyncIterator[trio.Process]:
    """Run the control plane inside a node; what it says is in `plane.log` of the folder."""
    log = folder / PLANE_LOG
    words = [sys.executable, "-m", "perf.plane", *map(str, sizes)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    async with process_in(node, words, log, env=env, stdin=authority.to_pem()) as process:
        await wait_for_word(READY, process, log)
        yield process


async def wait_for_word(word: str, process: trio.Process, log: Path) -> None:
    """Wait until a process has written a word.

    Raises:
        ContenderError: it ended, or did not say it in time.
    """
    with trio.move_on_after(READY_SECONDS):
        # Nothing tells when another process writes to a file.
        while process.poll() is None and word not in await trio.Path(log).read_text():  # noqa: ASYNC110
            await trio.sleep(POLL_SECONDS)
    if word not in await trio.Path(log).read_text():
        raise ContenderError(f"no {word} from the control plane:\n{tail(log)}")


async def _accepts(member: Member, port: int) -> bool:
    sock = member.netns.call(trio.socket.socket)
    with sock:
        try:
            await sock.connect(("127.0.0.1", port))
        except OSError:
            return False
    return True
