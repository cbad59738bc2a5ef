"""Questions that a load alone does not answer: memory, starting, pods, and many policies.

Each starts contenders afresh in every round, one after the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import trio

from cni.agent.errors import NoProxyError
from perf.contender import USUAL, Contender, Running, Wish
from perf.load import Load
from perf.mesh_file import NAMESPACE, NODES
from perf.node_proxies import NodeProxies, info, running_authority
from perf.processes import KIB_PER_MIB, cpu_seconds, private_kib, resident_kib
from perf.rounds import Lane, Progress, Sample, lanes, noted
from perf.shapes import HANDSHAKES, SHAPES, Metric, Question, Values
from perf.stalls import MESH, P99_METRICS, STALL_METRICS, TARGET, stalls, take_mesh
from perf.track import laid_track
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.workload import PodUid

CONNECTIONS = 4000
TUNNELS = 400
PARKED_SECONDS = 3.0  # a tunnel parks a second after it fell silent
IDLE_SECONDS = 3.0
FEW_PODS = 10
LARGE_MESH = (100_000, 5_000, 1_000)  # workloads, services, policies
SETTLED_SECONDS = 1.0
WARMED_BY = 200  # the first connections also grow tables that all later ones use
PODS = 50
WORKLOADS = 1000
POLICIES = 10_000
PASSES = 3
ROUNDS_MOST = 3

KIB_EACH = Metric(key="kib", unit="KiB each", more_is_better=False)
MIB_FRESH = Metric(key="mib", unit="MiB fresh", more_is_better=False)
MILLISECONDS = Metric(key="ms", unit="ms", more_is_better=False)
MILLISECONDS_LAST = Metric(key="last_ms", unit="ms, the last", more_is_better=False)
CPU_MS = Metric(key="cpu_ms", unit="ms of CPU a second", more_is_better=False)
CPU_SECONDS = Metric(key="cpu_s", unit="s of CPU", more_is_better=False)
WALL_SECONDS = Metric(key="wall_s", unit="s", more_is_better=False)
MIB = Metric(key="mib", unit="MiB", more_is_better=False)
PARKED = Metric(key="parked_kib", unit="KiB each further one, those parked", more_is_better=False)
OF_ONE = Metric(key="of_one", unit="x of one policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Question):
    """A question with a way to ask one contender; `meshed` ones mean proxies of the mesh only."""

    ask: Callable[[Contender, Load, Path], Awaitable[Values]]
    meshed: bool = True

    def takes(self, contender: Contender) -> bool:
        """Whether the question means anything to a contender."""
        return contender.name != "direct" and (
            not self.meshed or isinstance(contender, NodeProxies)
        )


async def answer(
    question: Question, contenders: Sequence[Contender], load: Load, folder: Path, rounds: int
) -> list[Sample]:
    """Ask all contenders whom it concerns, at most ROUNDS_MOST times."""
    assert isinstance(question, Probe)
    asked = [contender for contender in contenders if question.takes(contender)]
    turns = min(rounds, ROUNDS_MOST)
    progress, samples = Progress(len(asked) * turns), []
    for turn in range(turns):
        for contender in asked:
            progress.step(f"{question.name}: {contender.name}")
            own = folder / f"{question.name}-{turn}" / contender.name
            await trio.Path(own).mkdir(parents=True)
            with noted(contender.name):
                values = await question.ask(contender, load, own)
                samples.append(Sample(question.name, contender.name, turn, values))
    progress.end()
    return samples


async def idle_connections(contender: Contender, load: Load, folder: Path) -> Values:
    """Weigh a fresh process, then one that holds many idle connections."""
    return await _weighed(contender, load, folder, USUAL, CONNECTIONS)


async def idle_tunnels(contender: Contender, load: Load, folder: Path) -> Values:
    """Weigh idle connections that have a tunnel each."""
    return await _weighed(contender, load, folder, HANDSHAKES, TUNNELS, parked_after=PARKED_SECONDS)


async def _weighed(
    contender: Contender,
    load: Load,
    folder: Path,
    wish: Wish,
    count: int,
    parked_after: float = 0.0,
) -> Values:
    apart = wish.tunnel_per_connection
    async with lanes([contender], wish, load, folder) as (lane,):
        assert lane.running is not None
        fresh = [sum(map(resident_kib, end)) / KIB_PER_MIB for end in lane.running.ends]
        async with load.held(lane.track, TARGET, WARMED_BY, sources=apart):
            before = _private(lane.running)
            async with load.held(lane.track, TARGET, count, sources=apart):
                after = _private(lane.running)
                parked = await _weighed_again(lane, load, count, parked_after)
        each = [(b - a) / count for a, b in zip(before, after, strict=True)]
        return {
            "kib": sum(each), "kib_client": each[0], "kib_server": each[1],
            **parked,
            "mib": sum(fresh), "mib_client": fresh[0], "mib_server": fresh[1],
        }  # fmt: skip


async def _weighed_again(lane: Lane, load: Load, count: int, seconds: float) -> Values:
    """Weigh as many tunnels again when those that are there have parked.

    What these let go of stays with the process, and the new ones use it.
    """
    if not seconds:
        return {}
    assert lane.running is not None
    await trio.sleep(seconds)
    before = _private(lane.running)
    async with load.held(lane.track, TARGET, count, sources=True):
        after = _private(lane.running)
    each = [(b - a) / count for a, b in zip(before, after, strict=True)]
    return {"parked_kib": sum(each), "parked_kib_client": each[0], "parked_kib_server": each[1]}


def _private(running: Running) -> list[int]:
    return [sum(map(private_kib, end)) for end in running.ends]


async def first_byte(contender: Contender, load: Load, folder: Path) -> Values:
    """Time from starting both proxies until a byte has gone through both and back."""
    async with lanes([contender], USUAL, load, folder) as (lane,):
        assert lane.running is not None
        return {"ms": lane.running.ready_seconds * 1000}


async def version_shown(contender: Contender, _load: Load, _folder: Path) -> Values:
    """Time a whole process that only prints its version."""
    assert isinstance(contender, NodeProxies)
    times = []
    for _ in range(PASSES):
        began = time.perf_counter()
        await trio.run_process([*contender.words, "version"], capture_stdout=True)
        times.append((time.perf_counter() - began) * 1000)
    return {"ms": median(times)}


async def many_pods(contender: Contender, load: Load, folder: Path) -> Values:
    """Time from the start of a process until it serves what is there already."""
    assert isinstance(contender, NodeProxies)
    authority, wish = DevelopmentCa.create(), Wish(workloads=WORKLOADS, pods=PODS)
    with laid_track(load.program) as track, contextlib.ExitStack() as spaces:
        node = track.nodes[0]
        pods = [spaces.enter_context(new_namespace()) for _ in range(PODS)]
        async with running_authority(node, authority, folder):
            began = time.perf_counter()
            async with contender.node(NODES[0], node, wish, authority, folder) as proxy:
                for number, pod in enumerate(pods):
                    uid = PodUid(f"{NAMESPACE}-pod-{number}")
                    with contextlib.suppress(NoProxyError):
                        await proxy.agent.add(uid, info(f"pod-{number}"), pod)
                await proxy.enrol("client", track.client.netns)
                return {"ms": (time.perf_counter() - began) * 1000}


async def one_more_pod(contender: Contender, load: Load, folder: Path) -> Values:
    """Time from telling a running proxy of a pod until it has its listeners bound."""
    assert isinstance(contender, NodeProxies)
    authority, wish = DevelopmentCa.create(), Wish(pods=PODS)
    with laid_track(load.program) as track, contextlib.ExitStack() as spaces:
        node, times = track.nodes[0], []
        async with (
            running_authority(node, authority, folder),
            contender.node(NODES[0], node, wish, authority, folder) as proxy,
        ):
            await proxy.enrol("client", track.client.netns)
            for number in range(PODS):
                pod = spaces.enter_context(new_namespace())
                began = time.perf_counter()
                await proxy.enrol(f"pod-{number}", pod)
                times.append((time.perf_counter() - began) * 1000)
        return {"ms": median(times), "last_ms": median(times[-10:])}


async def idle_cpu(contender: Contender, load: Load, folder: Path) -> Values:
    """Measure what both proxies use while connections are there and nothing happens on them."""
    async with lanes([contender], USUAL, load, folder) as (lane,):
        assert lane.running is not None
        async with load.held(lane.track, TARGET, WARMED_BY, sources=False):
            await trio.sleep(SETTLED_SECONDS)
            before = [sum(map(cpu_seconds, end)) for end in lane.running.ends]
            await trio.sleep(IDLE_SECONDS)
            after = [sum(map(cpu_seconds, end)) for end in lane.running.ends]
    used = [(b - a) / IDLE_SECONDS * 1000 for a, b in zip(before, after, strict=True)]
    return {"cpu_ms": sum(used), "cpu_ms_client": used[0], "cpu_ms_server": used[1]}


async def few_pods(contender: Contender, load: Load, folder: Path) -> Values:
    """Weigh a process that serves a few pods and knows a small mesh."""
    assert isinstance(contender, NodeProxies)
    authority, wish = DevelopmentCa.create(), Wish(workloads=WORKLOADS, pods=FEW_PODS)
    with laid_track(load.program) as track, contextlib.ExitStack() as spaces:
        node = track.nodes[0]
        async with (
            running_authority(node, authority, folder),
            contender.node(NODES[0], node, wish, authority, folder) as proxy,
        ):
            for number in range(FEW_PODS):
                await proxy.enrol(f"pod-{number}", spaces.enter_context(new_namespace()))
            await trio.sleep(SETTLED_SECONDS)
            return {"mib": resident_kib(proxy.process.pid) / KIB_PER_MIB}


async def first_sync(contender: Contender, load: Load, folder: Path) -> Values:
    """Measure what it costs to learn of many workloads over the stream, with nothing else to do."""
    return await _learned(contender, load, folder, MESH)


async def large_mesh(contender: Contender, load: Load, folder: Path) -> Values:
    """Weigh a process that knows a very large mesh."""
    return await _learned(contender, load, folder, LARGE_MESH)


async def _learned(
    contender: Contender, load: Load, folder: Path, sizes: tuple[int, int, int]
) -> Values:
    async with lanes([contender], Wish(plane=sizes), load, folder) as (lane,):
        assert lane.running is not None
        pid = lane.running.client.pid
        began, before = time.perf_counter(), cpu_seconds(pid)
        await take_mesh(lane.running, folder / contender.name)
        values = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_seconds(pid) - before}
        await trio.sleep(SETTLED_SECONDS)
        return {**values, "mib": resident_kib(pid) / KIB_PER_MIB}


async def many_policies(contender: Contender, load: Load, folder: Path) -> Values:
    """Compare new connections per second under 10 000 policies with those under one."""
    shape = next(shape for shape in SHAPES if shape.name == "connect-16")
    async with (
        lanes([contender], USUAL, load, folder / "one") as (one,),
        lanes([contender], Wish(deny_policies=POLICIES), load, folder / "many") as (many,),
    ):
        rates: dict[str, list[float]] = {"one": [], "many": []}
        for _ in range(PASSES):
            for name, lane in (("one", one), ("many", many)):
                found = await load.run(lane.track.client, shape.command(lane.track, 0.7))
                rates[name].append(found["count"] / found["seconds"])
    pairs = zip(rates["many"], rates["one"], strict=True)
    return {"of_one": median(a / b for a, b in pairs)}


QUESTIONS: tuple[Question, ...] = (
    Probe(
        name="memory-connections",
        title=f"memory per idle tunnelled connection ({CONNECTIONS} held)",
        metric=KIB_EACH,
        more=(MIB_FRESH,),
        ask=idle_connections,
        meshed=False,
    ),
    Probe(
        name="memory-tunnels",
        title=f"memory per idle connection with a tunnel of its own ({TUNNELS} held)",
        metric=KIB_EACH,
        more=(PARKED,),
        ask=idle_tunnels,
        meshed=False,
    ),
    Probe(
        name="memory-pods",
        title=f"memory with {FEW_PODS} pods and {WORKLOADS} workloads, idle",
        metric=MIB,
        ask=few_pods,
    ),
    Probe(
        name="memory-mesh",
        title="memory with {} workloads, {} services and {} policies".format(*LARGE_MESH),
        metric=MIB,
        more=(CPU_SECONDS, WALL_SECONDS),
        ask=large_mesh,
    ),
    Probe(
        name="sync",
        title="first sync of {} workloads, {} services and {} policies".format(*MESH),
        metric=CPU_SECONDS,
        more=(WALL_SECONDS, MIB),
        ask=first_sync,
    ),
    Probe(
        name="stalls",
        title="longest stall, beside a ping-pong",
        metric=STALL_METRICS[0],
        more=(*STALL_METRICS[1:], *P99_METRICS),
        ask=stalls,
    ),
    Probe(
        name="idle",
        title=f"{WARMED_BY} idle connections",
        metric=CPU_MS,
        ask=idle_cpu,
        meshed=False,
    ),
    Probe(
        name="start-first-byte",
        title="start of both proxies to the first byte through them",
        metric=MILLISECONDS,
        ask=first_byte,
        meshed=False,
    ),
    Probe(
        name="start-version",
        title="a process that only prints its version",
        metric=MILLISECONDS,
        ask=version_shown,
    ),
    Probe(
        name="start-pods",
        title=f"start to serving {PODS} pods, {WORKLOADS} workloads known",
        metric=MILLISECONDS,
        ask=many_pods,
    ),
    Probe(
        name="pod-add",
        title="one more pod: told by the agent to listeners bound",
        metric=MILLISECONDS,
        more=(MILLISECONDS_LAST,),
        ask=one_more_pod,
    ),
    Probe(
        name="policies",
        title=f"new connections under {POLICIES} DENY policies of 10 rules, none matching",
        metric=OF_ONE,
        ask=many_policies,
    ),
)
