"""What a connection costs when there is much of something: workloads, policies, pods, streams.

Where `curves` times single steps in memory, this runs whole proxies. All sizes of one axis are up
at once and are measured in turn, so that they see the same machine. Flat means that the cost does
not grow with how many there are; memory grows by what each of them takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from perf.contender import Wish
from perf.curves import ENDPOINTS_EACH, Point
from perf.load import Load
from perf.node_proxies import NodeProxies
from perf.processes import KIB_PER_MIB, resident_kib
from perf.rounds import Lane, Progress, lanes, noted
from perf.shapes import SHAPES
from perf.stalls import TARGET, take_mesh

ROUNDS = 2
SECONDS = 0.5
UNITS = {
    "connect_per_s": "new connections/s, 16 at a time",
    "connect_us": "us of CPU for one of them, both proxies",
    "echo_p50_us": "us p50, ping-pong 64 B",
    "client_mib": "MiB of the client's proxy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Something of which there may be much; `held` streams are opened once all is up."""

    name: str
    sizes: tuple[int, ...]
    wish: Callable[[int], Wish] = lambda _: Wish()
    held: bool = False


AXES = (
    Axis(
        name="workloads",
        sizes=(1, 10, 100, 1000, 10_000, 100_000),
        wish=lambda size: Wish(plane=(size, -(-size // ENDPOINTS_EACH), 0)),
    ),
    Axis(
        name="services",
        sizes=(1, 10, 100, 1000, 10_000),
        wish=lambda size: Wish(plane=(1, size, 0)),
    ),
    Axis(
        name="policies",
        sizes=(1, 10, 100, 1000),  # ten thousand are a question of their own, with a goal
        wish=lambda size: Wish(deny_policies=size),
    ),
    Axis(name="pods", sizes=(1, 10, 100), wish=lambda size: Wish(pods=size, enrolled=size)),
    Axis(name="open streams", sizes=(1, 10, 100, 1000, 5000), held=True),
)


async def growth(ours: NodeProxies, load: Load, folder: Path) -> dict[str, dict[int, Point]]:
    """Measure every axis: what -> how many -> values by the names of `UNITS`."""
    progress = Progress(sum(len(axis.sizes) for axis in AXES) * ROUNDS)
    found = {}
    for axis in AXES:
        with noted(axis.name):
            found[axis.name] = await _measure(axis, ours, load, folder, progress)
    return found


async def _measure(
    axis: Axis, ours: NodeProxies, load: Load, folder: Path, progress: Progress
) -> dict[int, Point]:
    async with AsyncExitStack() as stack:
        up: dict[int, Lane] = {}
        for size in axis.sizes:
            ready = _ready(axis, size, ours, load, folder / f"{axis.name}-{size}")
            up[size] = await stack.enter_async_context(ready)
        found: dict[int, list[Point]] = {size: [] for size in axis.sizes}
        for _ in range(ROUNDS):
            for size, lane in up.items():
                progress.step(f"{size} {axis.name}")
                found[size].append(await _visit(lane, load))
    return {
        size: {key: median(point[key] for point in points) for key in UNITS}
        for size, points in found.items()
    }


@asynccontextmanager
async def _ready(
    axis: Axis, size: int, ours: NodeProxies, load: Load, folder: Path
) -> AsyncIterator[Lane]:
    wish = axis.wish(size)
    async with lanes([ours], wish, load, folder) as (lane,):
        assert lane.running is not None
        if wish.plane is not None:
            await take_mesh(lane.running, folder / ours.name)
        async with AsyncExitStack() as stack:
            if axis.held:
                held = load.held(lane.track, TARGET, size, sources=False)
                await stack.enter_async_context(held)
            yield lane


async def _visit(lane: Lane, load: Load) -> Point:
    assert lane.running is not None
    client, ends = lane.track.client, lane.running.ends
    connect, echo = (
        next(shape for shape in SHAPES if shape.name == name)
        for name in ("connect-16", "echo-64-1")
    )
    opened = connect.values(await load.run(client, connect.command(lane.track, SECONDS), ends))
    echoed = echo.values(await load.run(client, echo.command(lane.track, SECONDS), ends))
    return {
        "connect_per_s": opened["per_s"],
        "connect_us": opened["cpu"],
        "echo_p50_us": echoed["p50_us"],
        "client_mib": sum(map(resident_kib, ends[0])) / KIB_PER_MIB,
    }
