"""The endpoints of one service, and answers about them that are worth keeping.

How a follower keeps up: it is told nothing while nobody asks. Changes are noted once, by name, for
all followers; one that is asked for is first told what has changed since it was asked for last. So
a change costs the same however many answers there were, and one that is asked no more is dropped
once there is so much to tell that it would be as well made anew.
"""

from __future__ import annotations

from typing import Protocol

from ztunnel.model.workload import Workload, WorkloadUid

# For each service; a node's pods share a locality, so few are ever needed.
FOLLOWERS_MAX = 64
# To tell of a change takes as long as to look at so many endpoints when one is made anew.
CHANGE_ENDPOINTS = 16
CHANGES_MIN = 8


class Follower(Protocol):
    """An answer that keeps up with changes instead of being thought out again after each."""

    def changed(self, uid: WorkloadUid, workload: Workload | None) -> None:
        """Take in a new, changed or, if None, lost endpoint."""


class _Followers:
    """Those that know all changes, and those that must be told of some before they are asked."""

    __slots__ = ("behind", "changes", "current")

    def __init__(self) -> None:
        self.current: dict[object, Follower] = {}
        self.behind: dict[object, tuple[Follower, int]] = {}  # and how many changes it knows
        self.changes: list[WorkloadUid] = []

    def note(self, uid: WorkloadUid, most: int) -> None:
        """Note a change; followers that would have to be told of more than `most` are dropped."""
        if len(self.changes) >= most:
            self.behind.clear()
            self.changes.clear()
        if self.current:
            known = len(self.changes)
            self.behind.update((key, (one, known)) for key, one in self.current.items())
            self.current = {}
        if self.behind:
            self.changes.append(uid)

    def catch_up(self, key: object, members: dict[WorkloadUid, Workload]) -> Follower | None:
        """Tell a follower what it does not know; None if there is none of this key."""
        found, known = self.behind.pop(key, (None, 0))
        if found is not None:
            for uid in dict.fromkeys(self.changes[known:]):
                found.changed(uid, members.get(uid))
            self.current[key] = found
        if not self.behind:
            self.changes.clear()
        return found

    def add(self, key: object, follower: Follower) -> None:
        """Keep one that knows all changes."""
        if len(self.current) + len(self.behind) >= FOLLOWERS_MAX:
            self.current.clear()
            self.behind.clear()
        self.current[key] = follower


class Endpoints:
    """The workloads that say they serve one service. Most services are never asked about."""

    __slots__ = ("_followers", "members")

    def __init__(self) -> None:
        self.members: dict[WorkloadUid, Workload] = {}
        self._followers: _Followers | None = None

    def put(self, workload: Workload) -> None:
        """Add or replace one endpoint."""
        self.members[workload.uid] = workload
        self._note(workload.uid)

    def remove(self, uid: WorkloadUid) -> None:
        """Drop one endpoint."""
        self.members.pop(uid, None)
        self._note(uid)

    def forget(self) -> None:
        """Drop every answer: the service itself has changed."""
        self._followers = None

    def followed(self, key: object) -> Follower | None:
        """Return the follower kept for this key, told of all changes; None if there is none."""
        followers = self._followers
        if followers is None:
            return None
        return followers.current.get(key) or followers.catch_up(key, self.members)

    def follow(self, key: object, follower: Follower) -> None:
        """Keep a follower that knows all members."""
        if self._followers is None:
            self._followers = _Followers()
        self._followers.add(key, follower)

    def _note(self, uid: WorkloadUid) -> None:
        if self._followers is not None:
            self._followers.note(uid, max(CHANGES_MIN, len(self.members) // CHANGE_ENDPOINTS))
