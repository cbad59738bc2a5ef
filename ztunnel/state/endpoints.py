"""The endpoints of one service, and answers about them that are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ztunnel.model.workload import Workload, WorkloadUid

F = TypeVar("F", bound="Follower")

# Answers remembered per service; a node's pods share a locality, so few are ever needed.
MEMO_ENTRIES_MAX = 256
# A change costs each follower about 2 us.
FOLLOWERS_MAX = 64


class Follower(Protocol):
    """An answer that keeps up with changes instead of being thought out again after each."""

    def put(self, workload: Workload) -> bool:
        """Take in a new or changed endpoint; return False to be made anew."""

    def remove(self, uid: WorkloadUid) -> bool:
        """Take in that an endpoint is gone; return False to be made anew."""


class Endpoints:
    """The workloads that say they serve one service. Most services are never asked about."""

    __slots__ = ("_followers", "_memo", "members")

    def __init__(self) -> None:
        self.members: dict[WorkloadUid, Workload] = {}
        self._memo: dict[object, object] | None = None
        self._followers: dict[object, Follower] | None = None

    def put(self, workload: Workload) -> None:
        """Add or replace one endpoint."""
        self.members[workload.uid] = workload
        self._memo = None
        if self._followers:
            followers = self._followers.items()
            self._followers = {key: one for key, one in followers if one.put(workload)}

    def remove(self, uid: WorkloadUid) -> None:
        """Drop one endpoint."""
        self.members.pop(uid, None)
        self._memo = None
        if self._followers:
            followers = self._followers.items()
            self._followers = {key: one for key, one in followers if one.remove(uid)}

    def forget(self) -> None:
        """Drop every answer: the service itself has changed."""
        self._memo = self._followers = None

    def remember(self, key: object, compute: Callable[[], object]) -> object:
        """Return `compute()`, computed at most once per `key` until something changes."""
        if self._memo is None:
            self._memo = {}
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) >= MEMO_ENTRIES_MAX:
                self._memo.clear()
            found = self._memo[key] = compute()
        return found

    def follow(self, key: object, make: Callable[[], F]) -> F:
        """Return the follower of this key, made if need be; one key has one type of them."""
        if self._followers is None:
            self._followers = {}
        found = self._followers.get(key)
        if found is None:
            if len(self._followers) >= FOLLOWERS_MAX:
                self._followers.clear()
            found = self._followers[key] = make()
        return found  # type: ignore[return-value]  # the type that `make` gave it
