"""The endpoints of a service by rank, kept up to date, to draw from (state-and-xds.md 10.5).

A service may have thousands of endpoints that come and go many times a second. A change costs the
same however many there are: the one endpoint leaves its place, is ranked, and takes another one.
Those of one rank and one capacity are in one bag, from which any may be drawn; a bag is chosen by
what its endpoints can bear together, and there are few.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain
from typing import TypeAlias

from ztunnel.model.workload import Workload, WorkloadUid

# Gives those of them that are eligible, by rank; more is better.
Sort: TypeAlias = Callable[[Iterable[Workload]], dict[int, list[Workload]]]


class _Bag:
    """Endpoints in no particular order, each found at once."""

    __slots__ = ("_places", "workloads")

    def __init__(self, workloads: list[Workload]) -> None:
        self.workloads = workloads
        self._places = {one.uid: place for place, one in enumerate(workloads)}

    def add(self, workload: Workload) -> None:
        self._places[workload.uid] = len(self.workloads)
        self.workloads.append(workload)

    def remove(self, uid: WorkloadUid) -> bool:
        """Give the place of one to the last; return whether it was there."""
        place = self._places.pop(uid, None)
        if place is None:
            return False
        last = self.workloads.pop()
        if place < len(self.workloads):
            self.workloads[place] = last
            self._places[last.uid] = place
        return True


class Lot:
    """Endpoints of one rank, to draw from by capacity."""

    __slots__ = ("_alike", "_bags", "_order", "_totals")

    def __init__(self, workloads: list[Workload]) -> None:
        self._bags: dict[int, _Bag] = {}  # by the capacity of each endpoint in it
        self._totals: list[int] | None = None  # running totals of the bags, once asked for
        self._order: list[tuple[int, _Bag]] = []  # what they are totals of
        self._alike: list[Workload] = []  # all of them if they have one capacity, as nearly always
        capacities = {one.capacity for one in workloads}
        if len(capacities) == 1:
            self._bags[capacities.pop()] = _Bag(workloads)
        else:
            for one in workloads:
                self._bag(one.capacity).add(one)
        self._recount()

    def __len__(self) -> int:
        return sum(len(bag.workloads) for bag in self._bags.values())

    def __iter__(self) -> Iterator[Workload]:
        return chain.from_iterable(bag.workloads for bag in self._bags.values())

    def draw(self, rng: random.Random) -> Workload | None:
        """Pick one by capacity; None if all have none."""
        if self._alike:
            return rng.choice(self._alike)
        if self._totals is None:
            self._order = list(self._bags.items())
            self._totals = list(accumulate([n * len(bag.workloads) for n, bag in self._order]))
        if not self._totals or not self._totals[-1]:
            return None
        point = rng.randrange(self._totals[-1])
        number = bisect_right(self._totals, point)
        capacity, bag = self._order[number]
        return bag.workloads[(self._totals[number] - 1 - point) // capacity]

    def add(self, workload: Workload) -> None:
        """Take in one that is not here."""
        self._bag(workload.capacity).add(workload)
        self._recount()

    def remove(self, uid: WorkloadUid) -> bool:
        """Drop one; return whether it was here."""
        for capacity, bag in self._bags.items():
            if bag.remove(uid):
                if not bag.workloads:
                    del self._bags[capacity]
                self._recount()
                return True
        return False

    def _bag(self, capacity: int) -> _Bag:
        bag = self._bags.get(capacity)
        if bag is None:
            bag = self._bags[capacity] = _Bag([])
        return bag

    def _recount(self) -> None:
        self._totals = None
        if len(self._bags) == 1:
            [(capacity, bag)] = self._bags.items()
            self._alike = bag.workloads if capacity else []
        else:
            self._alike = []


class PickList:
    """A follower of a service's endpoints (`state.endpoints`); the best of them are in `best`."""

    __slots__ = ("_lots", "_sort", "best")

    def __init__(self, sort: Sort, workloads: Iterable[Workload]) -> None:
        self._sort = sort
        self._lots = {rank: Lot(there) for rank, there in sort(workloads).items()}
        self._choose()

    def by_rank(self) -> Iterator[Lot]:
        """Yield all endpoints, the best first."""
        return (self._lots[rank] for rank in sorted(self._lots, reverse=True))

    def changed(self, uid: WorkloadUid, workload: Workload | None) -> None:
        """Take in a new, changed or, if None, lost endpoint."""
        for rank, lot in self._lots.items():
            if lot.remove(uid):
                if not lot:
                    del self._lots[rank]
                break
        if workload is not None:
            self._take(workload)
        self._choose()

    def _take(self, workload: Workload) -> None:
        for rank, [one] in self._sort((workload,)).items():
            lot = self._lots.get(rank)
            if lot is None:
                self._lots[rank] = Lot([one])
            else:
                lot.add(one)

    def _choose(self) -> None:
        self.best = self._lots[max(self._lots)] if self._lots else Lot([])
