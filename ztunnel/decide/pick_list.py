"""The endpoints of the best rank, kept up to date, to draw from (state-and-xds.md 10.5).

A service may have thousands of endpoints that come and go many times a second. A change costs the
same however many there are: the one endpoint is judged, and takes or leaves a place in a list.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TypeAlias

from ztunnel.model.workload import Workload, WorkloadUid

# The rank of an endpoint; None if it is not eligible.
Judge: TypeAlias = Callable[[Workload], int | None]


class PickList:
    """A follower of a service's endpoints (`state.endpoints`)."""

    __slots__ = (
        "_capacities",
        "_has_others",
        "_judge",
        "_places",
        "_rank",
        "_totals",
        "_workloads",
    )

    def __init__(self, judge: Judge, workloads: Iterable[Workload]) -> None:
        ranked = [(rank, one) for one in workloads if (rank := judge(one)) is not None]
        best = max([rank for rank, _ in ranked], default=0)
        there = [one for rank, one in ranked if rank == best]
        self._judge = judge
        self._rank = best
        self._workloads = there
        self._has_others = len(there) < len(ranked)  # of lower ranks: needed if these should go
        # Where in the list each one is.
        self._places = {one.uid: place for place, one in enumerate(there)}
        self._capacities = Counter([one.capacity for one in there])  # and how many have each
        self._totals: list[int] | None = None  # running totals of capacity, once asked for

    @property
    def workloads(self) -> Sequence[Workload]:
        """A live view of the list, in no particular order."""
        return self._workloads

    def put(self, workload: Workload) -> bool:
        """Take in a new or changed endpoint; False if the list must be made anew."""
        self._drop(workload.uid)
        if not self._workloads and self._has_others:
            return False
        rank = self._judge(workload)
        if rank is not None:
            self._take(workload, rank)
        return True

    def remove(self, uid: WorkloadUid) -> bool:
        """Take in that an endpoint is gone; False if the list must be made anew."""
        self._drop(uid)
        return bool(self._workloads) or not self._has_others

    def draw(self, rng: random.Random) -> Workload | None:
        """Pick one by capacity; None if all have none."""
        workloads = self._workloads
        if not workloads:
            return None
        if len(self._capacities) == 1:
            is_any = 0 not in self._capacities
            return rng.choice(workloads) if is_any else None
        if self._totals is None:
            self._totals = list(accumulate([one.capacity for one in workloads]))
        return workloads[bisect_right(self._totals, rng.randrange(self._totals[-1]))]

    def _take(self, workload: Workload, rank: int) -> None:
        if self._workloads and rank != self._rank:
            self._has_others = True
            if rank < self._rank:
                return
            self._workloads.clear()
            self._places.clear()
            self._capacities.clear()
        self._rank = rank
        self._totals = None
        self._places[workload.uid] = len(self._workloads)
        self._workloads.append(workload)
        self._capacities[workload.capacity] += 1

    def _drop(self, uid: WorkloadUid) -> None:
        """Give the place of one to the last."""
        place = self._places.pop(uid, None)
        if place is None:
            return
        self._totals = None
        capacity = self._workloads[place].capacity
        self._capacities[capacity] -= 1
        if not self._capacities[capacity]:
            del self._capacities[capacity]
        last = self._workloads.pop()
        if place < len(self._workloads):
            self._workloads[place] = last
            self._places[last.uid] = place
