"""The metrics of several processes as those of one node. No I/O.

How it works: each process prints its own registry, and the text is read back here: a family is its
head and its samples by name and labels. Samples of the same labels are added up, which is right for
counters, histograms and gauges of what a process holds; the few for which it is not are listed.
When a worker is gone its counters stay, so that none ever falls, and its gauges go with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ztunnel.errors import PeerError
from ztunnel.telemetry.exposition import END, SERIES_MAX, Kind, number

# The same in each process, or a limit of each, or the worst of all: the largest is told.
LARGEST = frozenset({"istio_build", "process_max_fds", "ztunnel_event_loop_longest_stall_seconds"})
# The control process alone knows the pods of the node.
OF_THE_NODE = "workload_manager_"
# Samples of workers that are gone: far more than one of them has, so that only a worker that keeps
# dying, with other labels each time, comes to lose some.
BURIED_MAX = 20 * SERIES_MAX
OPENED = "istio_tcp_connections_opened"


@dataclass(slots=True)
class Samples:
    """One family of one process; values by name and labels as they are printed."""

    head: str = ""
    kind: str = ""
    values: dict[str, float] = field(default_factory=dict)


class Exposition:
    """The metrics of one process, read from its text."""

    def __init__(self) -> None:
        self.families: dict[str, Samples] = {}
        self._current = Samples()

    def feed(self, text: str) -> None:
        """Take a part of the text: whole lines, in the order in which they are printed.

        Raises:
            PeerError: it is no exposition.
        """
        for line in text.splitlines():
            if line.startswith("#"):
                self._take_head(line)
                continue
            key, _, value = line.rpartition(" ")
            try:
                self._current.values[key] = float(value)
            except ValueError as exc:
                raise PeerError(f"not a metric: {line[:80]!r}") from exc

    def total(self, family: str) -> float:
        """Add up all samples of a family."""
        samples = self.families.get(family)
        return 0.0 if samples is None else sum(samples.values.values())

    def _take_head(self, line: str) -> None:
        word, name, *rest = (*line[2:].split(" ", 2), "")
        if word == "HELP":
            self._current = self.families.setdefault(name, Samples())
            self._current.head = ""
        elif word == "TYPE":
            self._current.kind = rest[0]
        if word != END.split()[1]:
            self._current.head += line + "\n"


class Tally:
    """What the workers told, by number; `text` adds our own."""

    def __init__(self) -> None:
        self._told: dict[int, Exposition] = {}
        self._buried = Exposition()
        self._buried_samples = 0
        self._opened_before: dict[int, float] = {}  # by the dead of the same number

    def told(self, worker: int, metrics: Exposition) -> None:
        """Take what a worker says now in place of what it said before."""
        self._told[worker] = metrics

    def bury(self, worker: int) -> None:
        """Keep the counters of a worker that is gone, as it told them last."""
        gone = self._told.pop(worker, None)
        if gone is None:
            return
        before = self._opened_before.get(worker, 0.0)
        self._opened_before[worker] = before + gone.total(OPENED)
        for name, samples in gone.families.items():
            if samples.kind == Kind.GAUGE:
                continue
            kept = self._buried.families.setdefault(name, Samples(samples.head, samples.kind))
            for key, value in samples.values.items():
                if key not in kept.values:
                    if self._buried_samples >= BURIED_MAX:
                        continue
                    self._buried_samples += 1
                kept.values[key] = kept.values.get(key, 0.0) + value

    def opened(self, worker: int) -> float:
        """Say how many connections the workers of this number have opened, as far as told."""
        told = self._told.get(worker)
        now = 0.0 if told is None else told.total(OPENED)
        return self._opened_before.get(worker, 0.0) + now

    def text(self, own: Iterable[str]) -> Iterator[str]:
        """Print everything as OpenMetrics, in pieces; `own` is the text of this process."""
        ours = Exposition()
        for piece in own:
            ours.feed(piece)
        workers = [self._buried, *self._told.values()]
        names = dict.fromkeys(name for source in (ours, *workers) for name in source.families)
        for name in names:
            told = [] if name.startswith(OF_THE_NODE) else workers
            present = [source.families[name] for source in (ours, *told) if name in source.families]
            if any(samples.values for samples in present):
                yield present[0].head
                yield from _merged(present, largest=name in LARGEST)
        yield END


def _merged(present: list[Samples], *, largest: bool) -> Iterator[str]:
    values = dict(present[0].values)
    for samples in present[1:]:
        for key, value in samples.values.items():
            known = values.get(key, value if largest else 0.0)
            values[key] = max(known, value) if largest else known + value
    for key, value in values.items():
        yield f"{key} {number(value)}\n"
