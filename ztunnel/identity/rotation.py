"""When to fetch, renew and retry each certificate (dataplane.md 8.4); pure, takes `now`.

How it works: one entry per identity. An entry is queued, in flight, or has nothing to do; queued
entries wait in `_ready` (most urgent first) or, if their time has not come, in `_later`. Requeueing
leaves the old queue item behind; an item counts only while its number is the entry's `turn`.

Four differences from the reference, on purpose: renewals are spread around half the lifetime, so
that certificates fetched together do not stay together for ever; half the lifetime is counted from
the fetch, so that a short-lived, backdated one is not renewed at once; an expired certificate is
never handed out; the nearer the expiry, the sooner a failed renewal is tried again, so that a CA
that comes back in the last moment is not missed.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from random import Random

from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

IN_FLIGHT_MAX = 8  # calls to the CA at the same time, as in the reference
RENEW_BETWEEN = (0.4, 0.6)  # of what is left of the lifetime
BACKOFF_FIRST_SECONDS = 1.0
BACKOFF_MAX_SECONDS = 150.0
BACKOFF_SPREAD = (0.8, 1.2)
LAST_RETRY_SECONDS = 0.1  # while a certificate runs out: half of what is left, but not less
DOUBLINGS_MAX = 8  # 2**8 s is over the cap; more would only make large numbers


class Urgency(IntEnum):
    """Who waits for a certificate; smaller goes first."""

    CONNECTION = 0
    PREFETCH = 1
    RENEWAL = 2


class CertificateState(StrEnum):
    """The reference's words for the configuration dump."""

    INITIALIZING = "Initializing"
    AVAILABLE = "Available"
    UNAVAILABLE = "Unavailable"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateStatus:
    """What is known for one identity; `error` may stand beside a certificate that is valid."""

    identity: Identity
    state: CertificateState
    certificate: WorkloadCertificate | None
    error: str | None


@dataclass(slots=True, eq=False)
class _Entry:
    identity: Identity
    urgency: Urgency
    due: float = 0.0
    turn: int = 0  # number of the queue item that counts; 0 = not queued
    certificate: WorkloadCertificate | None = None
    error: str | None = None
    failures: int = 0
    is_in_flight: bool = False
    is_forgotten: bool = False


def renew_at(certificate: WorkloadCertificate, now: float, random: Random) -> float:
    """Give the time to renew: about the middle of what is left, never after expiry."""
    start = max(certificate.not_before, now)
    left = max(0.0, certificate.not_after - start)
    return start + left * random.uniform(*RENEW_BETWEEN)


def backoff_seconds(failures: int, random: Random) -> float:
    """Give the pause after so many failures in a row: 1 s, doubled each time, at most 150 s."""
    doubled = BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, DOUBLINGS_MAX)
    return min(BACKOFF_MAX_SECONDS, doubled * random.uniform(*BACKOFF_SPREAD))


class Rotation:
    """The state of all identities of a node. Whoever takes an identity must settle it."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._entries: dict[Identity, _Entry] = {}
        self._ready: list[tuple[Urgency, float, int, _Entry]] = []
        self._later: list[tuple[float, int, _Entry]] = []
        self._turns = 0
        self._in_flight = 0
        # By identity of the object: asked for each stream, where hashing a name would cost.
        self._newest: set[WorkloadCertificate] = set()

    def certificate(self, identity: Identity, now: float) -> WorkloadCertificate | None:
        """Give a valid certificate, if there is one."""
        entry = self._entries.get(identity)
        if entry is None or entry.is_forgotten or entry.certificate is None:
            return None
        return None if entry.certificate.has_expired(now) else entry.certificate

    def is_newest(self, certificate: WorkloadCertificate) -> bool:
        """Say whether nothing has taken the place of this certificate, nor was it forgotten."""
        return certificate in self._newest

    def want(self, identity: Identity, urgency: Urgency, now: float) -> None:
        """Ask for a certificate; does nothing if one is there or a retry is scheduled."""
        entry = self._entries.get(identity)
        if entry is None:
            entry = self._entries[identity] = _Entry(identity, urgency)
            self._queue(entry, urgency, now, now)
            return
        if entry.is_forgotten:
            entry.is_forgotten = False
            self._put(entry, entry.certificate)
        if entry.is_in_flight or entry.error is not None:
            return
        has_valid = self.certificate(identity, now) is not None
        if not has_valid and (urgency < entry.urgency or entry.due > now):
            self._queue(entry, min(urgency, entry.urgency), now, now)

    def take_due(self, now: float) -> list[Identity]:
        """Give the identities to fetch now, most urgent first, as many as may be in flight."""
        while self._later and self._later[0][0] <= now:
            due, turn, entry = heapq.heappop(self._later)
            heapq.heappush(self._ready, (entry.urgency, due, turn, entry))
        taken = []
        while self._ready and self._in_flight < IN_FLIGHT_MAX:
            _, _, turn, entry = heapq.heappop(self._ready)
            if turn == entry.turn:
                entry.turn = 0
                entry.is_in_flight = True
                self._in_flight += 1
                taken.append(entry.identity)
        return taken

    def next_due(self) -> float:
        """Give the time of the next scheduled fetch; infinity if there is none."""
        while self._later and self._later[0][1] != self._later[0][2].turn:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else math.inf

    def succeeded(self, certificate: WorkloadCertificate, identity: Identity, now: float) -> None:
        """Note the result of a fetch, and schedule the renewal."""
        entry = self._landed(identity)
        if entry is not None:
            self._put(entry, certificate)
            entry.error = None
            entry.failures = 0
            renewal = renew_at(certificate, now, self._random)
            self._queue(entry, Urgency.RENEWAL, renewal, now)

    def failed(self, error: str, identity: Identity, now: float) -> None:
        """Note a failure and schedule a retry; a valid certificate stays in use."""
        entry = self._landed(identity)
        if entry is None:
            return
        entry.error = error
        retry = now + backoff_seconds(entry.failures + 1, self._random)
        if self.certificate(identity, now) is None:
            self._put(entry, None)
            entry.failures += 1
            self._queue(entry, Urgency.PREFETCH, retry, now)
        else:
            assert entry.certificate is not None
            not_after = entry.certificate.not_after
            hurry = now + max(LAST_RETRY_SECONDS, (not_after - now) / 2)
            entry.failures += retry <= hurry  # attempts in a hurry do not lengthen later pauses
            self._queue(entry, Urgency.RENEWAL, min(retry, hurry, not_after), now)

    def renew(self, identity: Identity, now: float) -> None:
        """Replace a certificate before its time; does nothing while an attempt or retry is due."""
        entry = self._entries.get(identity)
        if entry is None or entry.is_in_flight or entry.error is not None:
            return
        self._queue(entry, min(entry.urgency, Urgency.RENEWAL), now, now)

    def forget(self, identity: Identity) -> None:
        """Drop an identity; the result of a fetch in flight is dropped when it arrives."""
        entry = self._entries.get(identity)
        if entry is None:
            return
        if entry.is_in_flight:
            entry.is_forgotten = True
            if entry.certificate is not None:
                self._newest.discard(entry.certificate)
        else:
            entry.turn = 0
            self._put(entry, None)  # its queue item may stay until the renewal would be due
            del self._entries[identity]

    def status(self, identity: Identity, now: float) -> CertificateStatus | None:
        """Say how it stands with an identity; None if nobody wants it."""
        entry = self._entries.get(identity)
        if entry is None or entry.is_forgotten:
            return None
        certificate = self.certificate(identity, now)
        state = CertificateState.INITIALIZING
        if certificate is not None:
            state = CertificateState.AVAILABLE
        elif entry.error is not None:
            state = CertificateState.UNAVAILABLE
        return CertificateStatus(
            identity=identity, state=state, certificate=certificate, error=entry.error
        )

    def snapshot(self, now: float) -> list[CertificateStatus]:
        """List all identities, sorted."""
        statuses = (self.status(identity, now) for identity in sorted(self._entries))
        return [status for status in statuses if status is not None]

    def _put(self, entry: _Entry, certificate: WorkloadCertificate | None) -> None:
        if entry.certificate is not None:
            self._newest.discard(entry.certificate)
        entry.certificate = certificate
        if certificate is not None:
            self._newest.add(certificate)

    def _landed(self, identity: Identity) -> _Entry | None:
        """Take an identity out of flight; None if it was forgotten meanwhile."""
        entry = self._entries[identity]
        assert entry.is_in_flight
        entry.is_in_flight = False
        self._in_flight -= 1
        if entry.is_forgotten:
            del self._entries[identity]
            return None
        return entry

    def _queue(self, entry: _Entry, urgency: Urgency, due: float, now: float) -> None:
        self._turns += 1
        entry.turn = self._turns
        entry.urgency = urgency
        entry.due = due
        if due <= now:
            heapq.heappush(self._ready, (urgency, due, entry.turn, entry))
        else:
            heapq.heappush(self._later, (due, entry.turn, entry))
