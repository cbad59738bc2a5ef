"""Measuring fairly: all contenders are up, each shape goes round them, round after round.

How it works: what one contender gains or loses by the machine's mood its neighbours in time gain or
lose too, so only figures of the same shape and round are compared. Who comes first changes from
round to round. A measurement that fails is noted and does not end the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from perf.contender import Contender, ContenderError, Running, Wish
from perf.load import Load, LoadError
from perf.shapes import Shape, Values
from perf.track import Track, laid_track
from ztunnel.errors import first
from ztunnel.identity.dev_ca import DevelopmentCa

FAILED_MOST = 0.001


@dataclass(frozen=True, slots=True)
class Sample:
    """What one contender did in one round of one shape."""

    shape: str
    contender: str
    number: int  # of the round
    values: Values


@contextmanager
def noted(who: str) -> Iterator[None]:
    """Say what went wrong in the block, and go on: the rest of the run is not to be lost."""
    try:
        yield
    except* (ContenderError, LoadError) as group:
        sys.stderr.write(f"\n{who}: {first(group)}\n")


@dataclass(slots=True)
class Progress:
    """One line that says how far we are; rewritten in place on a terminal."""

    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def step(self, what: str) -> None:
        """Note that the next measurement begins."""
        self.done += 1
        spent = time.monotonic() - self.began
        left = spent / max(self.done - 1, 1) * (self.total - self.done + 1)
        line = f"[{self.done}/{self.total}] {what}, {left:.0f} s left"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


@dataclass(slots=True)
class Lane:
    """A contender that is up, on its own track."""

    contender: Contender
    track: Track
    running: Running | None

    def takes(self, shape: Shape) -> bool:
        """Whether it runs this shape: without a proxy, there are no handshakes to measure."""
        return self.running is not None or shape.has_direct


@asynccontextmanager
async def lanes(
    contenders: Iterable[Contender], wish: Wish, load: Load, folder: Path
) -> AsyncIterator[list[Lane]]:
    """Have all contenders up during the block; their files lie in `folder`."""
    authority = DevelopmentCa.create()
    async with AsyncExitStack() as stack:
        found = []
        for contender in contenders:
            track = stack.enter_context(laid_track(load.program))
            own = folder / contender.name
            own.mkdir(parents=True, exist_ok=True)
            starting = contender.running(track, wish, authority, own)
            found.append(Lane(contender, track, await stack.enter_async_context(starting)))
        yield found


async def measure(
    shapes: Sequence[Shape],
    contenders: Sequence[Contender],
    load: Load,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
) -> list[Sample]:
    """Run every shape with every contender, `rounds` times, `seconds` each.

    Raises:
        ContenderError: one of them does not start.
    """
    samples: list[Sample] = []
    progress = Progress(len(shapes) * len(contenders) * rounds)
    in_groups = groupby(
        sorted(shapes, key=lambda s: s.wish is not shapes[0].wish), lambda s: s.wish
    )
    for number, (wish, group) in enumerate(in_groups):
        members = list(group)
        async with lanes(contenders, wish, load, folder / f"group-{number}") as up:
            for turn in range(rounds):
                for shape in members:
                    for lane in _rotated(up, turn):
                        progress.step(f"{shape.name}: {lane.contender.name}")
                        samples += await _one(shape, lane, load, turn, seconds)
    progress.end()
    return samples


async def _one(shape: Shape, lane: Lane, load: Load, turn: int, seconds: float) -> list[Sample]:
    if not lane.takes(shape):
        return []
    ends = lane.running.ends if lane.running else ()
    try:
        words = shape.command(lane.track, seconds)
        found = await load.run(lane.track.client, words, ends)
        check(shape, found)
    except LoadError as error:
        sys.stderr.write(f"\n{lane.contender.name}: {error}\n")
        return []
    lane.track.take_sources(found["sources"])
    return [Sample(shape.name, lane.contender.name, turn, shape.values(found))]


def check(shape: Shape, found: Mapping[str, Any]) -> None:
    """Refuse a result of which little is true: what fails fast must not look fast.

    Raises:
        LoadError: nothing got through, or too many connections failed.
    """
    done = found["count"] or found["bytes"]
    if not done or found["failures"] > done * FAILED_MOST:
        raise LoadError(f"{shape.name}: {found['failures']} failed and {done} did not")


def _rotated(up: list[Lane], turn: int) -> list[Lane]:
    start = turn % len(up)
    return up[start:] + up[:start]
