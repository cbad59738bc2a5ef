"""HBONE connections of one workload, shared by streams that go to the same peer (dataplane.md 6.3).

A key names everything that must be equal for two streams to share a connection: who we are, whom we
accept as the peer, where it is, and the address of the application that speaks. One dial per key is
under way at a time and everyone who waits shares its outcome; a failure is remembered for a moment,
so that a black hole costs its callers one dial and not one each (dataplane.md 17.1 and 17.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import DrainError, LimitError, ZtunnelError
from ztunnel.transport.attempt import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.decide.authorize import Permit
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.transport.attempt import TunnelDial, Waiter
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone.events import RequestReceived

SPREAD_MOST = 4
"""How many tunnels a busy destination gets before its streams fill them up."""
NEGATIVE_SECONDS = 0.5
"""How long a failed dial answers for later callers; short, as peers come up at any moment."""


@dataclass(frozen=True, slots=True)
class PoolKey:
    """What two streams must have in common to share a connection."""

    source: Identity
    expected: tuple[Identity, ...]
    peer: Endpoint
    source_ip: IpAddress | None
    digest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash once: addresses and identities are slow to hash, and a key is looked up often."""
        parts = self.source, self.expected, self.peer, self.source_ip
        object.__setattr__(self, "digest", hash(parts))

    def __hash__(self) -> int:
        return self.digest


@dataclass(slots=True)
class _Entry:
    """What the pool knows about one key."""

    tunnels: list[Tunnel] = field(default_factory=list)
    attempt: Attempt | None = None
    failed_until: float = 0.0
    failure: ZtunnelError | None = None


class Pool:
    """The tunnels of one workload; also their owner.

    `is_current` says whether a tunnel may carry new streams as far as certificates go; one that may
    not is left, and ends with its last stream. `on_gone` is told of each tunnel that has closed.
    """

    def __init__(
        self,
        reactor: Reactor,
        dial: TunnelDial,
        *,
        streams_per_tunnel: int,
        idle_seconds: float,
        dial_seconds: float,
        is_current: Callable[[Tunnel], bool] = lambda _: True,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self._reactor = reactor
        self._dial = dial
        self._streams_per_tunnel = streams_per_tunnel
        self._idle_seconds = idle_seconds
        self._dial_seconds = dial_seconds
        self._is_current = is_current
        self._on_gone = on_gone
        self._entries: dict[PoolKey, _Entry] = {}
        self._keys: dict[Tunnel, PoolKey] = {}
        self._settling: dict[Tunnel, Attempt] = {}  # the peer's settings are on the way
        self._leaving: set[Tunnel] = set()  # the peer takes no more streams; some go on
        self._watched: set[Tunnel] = set()  # an idle timer is running
        self._closed = False

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: PoolKey, permit: Permit | None = None) -> Tunnel | None:
        """Give a usable tunnel with room for a stream, if there is one. O(tunnels of the key).

        When each of them has more to send than its socket takes, another is dialled beside it, up
        to `SPREAD_MOST`, if there is a permit: one connection means one core of the peer
        (dataplane.md 17.48).
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        congested: Tunnel | None = None
        for tunnel in tuple(entry.tunnels):
            if not self._has_room(tunnel):
                continue
            if not self._is_current(tunnel):
                self.on_goaway(tunnel)
            elif not tunnel.blocked:
                return tunnel
            else:
                congested = congested or tunnel
        if congested is not None and permit is not None and self._may_spread(entry):
            self._begin(key, permit, entry, [])
        return congested

    def tunnels(self) -> list[Tunnel]:
        """List all tunnels, also those that take no new streams."""
        return [*self._keys, *self._leaving]

    def leave_old(self) -> None:
        """Leave every tunnel whose certificates allow no new streams."""
        for tunnel in list(self._keys):
            if not self._is_current(tunnel):
                self.on_goaway(tunnel)

    def request(self, key: PoolKey, permit: Permit, waiter: Waiter) -> None:
        """Dial a tunnel, or wait for one that is being dialled; `waiter` is told later."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.attempt is not None:
            entry.attempt.waiting.append((waiter, permit))
        elif (refusal := self._refusal(entry)) is not None:
            self._reactor.soon(lambda: waiter.on_no_tunnel(refusal))
        else:
            self._begin(key, permit, entry, [(waiter, permit)])

    def drain(self) -> None:
        """Send no new streams; each tunnel closes when its last stream ends."""
        self._closed = True
        for tunnel in list(self._keys):
            tunnel.drain()

    def close(self) -> None:
        """Close every tunnel now."""
        self._closed = True
        for entry in list(self._entries.values()):
            if entry.attempt is not None:
                entry.attempt.cancel()
        for tunnel in [*self._keys, *self._leaving]:
            tunnel.close(DrainError("connection closed due to connection drain"))

    # Tunnels call these.

    def on_settings(self, tunnel: Tunnel) -> None:
        """Let those go who wait for the tunnel to be usable."""
        attempt = self._settling.pop(tunnel, None)
        if attempt is not None:
            attempt.settle()

    def on_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """Refuse: a server does not open streams (RFC 9113 s8.4)."""
        tunnel.core.reset(request.stream, 1)
        tunnel.flush_later()

    def on_goaway(self, tunnel: Tunnel) -> None:
        """Use the tunnel no more; close it when its streams have ended."""
        if tunnel in self._keys:
            self._remove(tunnel)
            self._leaving.add(tunnel)
        if not tunnel.core.streams:
            self._reactor.soon(tunnel.close)

    def on_released(self, tunnel: Tunnel) -> None:
        """Close a tunnel that has been left, or after it has been idle for long."""
        if tunnel.core.streams or tunnel.closed:
            return
        if tunnel not in self._keys:
            self._reactor.soon(tunnel.close)
        else:
            self._watch(tunnel)

    def on_closed(self, tunnel: Tunnel, error: ZtunnelError | None) -> None:  # noqa: ARG002
        """Forget the tunnel."""
        self._remove(tunnel)
        self._leaving.discard(tunnel)
        self.on_settings(tunnel)
        self._on_gone()

    # Attempts call these.

    def settling(self, tunnel: Tunnel, attempt: Attempt) -> None:
        """Have `attempt` told when the tunnel's peer has sent its settings, or is gone."""
        self._settling[tunnel] = attempt

    def take_in(self, key: PoolKey, tunnel: Tunnel) -> None:
        """Own a tunnel that is up, unless it is of no use to anybody.

        Otherwise a peer that says GOAWAY at once, or takes no streams, would be dialled for ever.

        Raises:
            DrainError: the pool is closed.
            LimitError: the peer takes no streams.
        """
        if self._closed:
            raise DrainError("pool draining")
        if not self._has_room(tunnel):
            raise LimitError(f"{key.peer} takes no streams")
        self._entries[key].tunnels.append(tunnel)
        self._keys[tunnel] = key
        self._watch(tunnel)

    def on_attempted(self, attempt: Attempt, tunnel: Tunnel) -> None:
        """Serve those who waited; for whom there is no room, another tunnel is found."""
        key = attempt.key
        entry = self._entries[key]
        entry.attempt = entry.failure = None
        for waiter, permit in attempt.waiting:
            found = tunnel if self._has_room(tunnel) else self.get(key, permit)
            if found is not None:
                waiter.on_tunnel(found)
            else:
                self.request(key, permit, waiter)

    def on_failed(self, attempt: Attempt, error: ZtunnelError) -> None:
        """Tell those who waited, and for a moment whoever comes next."""
        key = attempt.key
        entry = self._entries[key]
        entry.attempt = None
        entry.failure = error
        entry.failed_until = trio.current_time() + NEGATIVE_SECONDS
        self._reactor.deadline(NEGATIVE_SECONDS, lambda: self._tidy(key))
        for waiter, _ in attempt.waiting:
            waiter.on_no_tunnel(error)

    def _refusal(self, entry: _Entry) -> ZtunnelError | None:
        """Say why nothing is dialled now."""
        if self._closed:
            return DrainError("pool draining")
        return entry.failure if trio.current_time() < entry.failed_until else None

    def _may_spread(self, entry: _Entry) -> bool:
        """Say whether one more tunnel beside those of the entry is to be dialled now."""
        few = len(entry.tunnels) < SPREAD_MOST
        return few and entry.attempt is None and self._refusal(entry) is None

    def _begin(
        self, key: PoolKey, permit: Permit, entry: _Entry, waiting: list[tuple[Waiter, Permit]]
    ) -> None:
        seconds = self._dial_seconds
        attempt = Attempt(self._reactor, self, self._dial, key, permit, seconds=seconds)
        attempt.waiting += waiting
        entry.attempt = attempt
        attempt.begin()

    # Keeping house.

    def _has_room(self, tunnel: Tunnel) -> bool:
        core = tunnel.core
        limit = min(self._streams_per_tunnel, core.peer_max_concurrent_streams)
        return tunnel.accepts_streams and len(core.streams) < limit

    def _remove(self, tunnel: Tunnel) -> None:
        key = self._keys.pop(tunnel, None)
        if key is not None:
            self._entries[key].tunnels.remove(tunnel)
            self._tidy(key)

    def _tidy(self, key: PoolKey) -> None:
        """Forget a key that has nothing left to remember (17.7)."""
        entry = self._entries.get(key)
        if (
            entry is not None
            and not entry.tunnels
            and entry.attempt is None
            and trio.current_time() >= entry.failed_until
        ):
            del self._entries[key]

    def _watch(self, tunnel: Tunnel) -> None:
        """Run one timer for a tunnel, whatever comes and goes on it.

        So a busy tunnel costs no timer per stream, and one that falls idle lives for at least the
        idle time and at most twice as long.
        """
        if tunnel not in self._watched:
            self._watched.add(tunnel)
            opened = tunnel.opened
            self._reactor.deadline(self._idle_seconds, lambda: self._close_idle(tunnel, opened))

    def _close_idle(self, tunnel: Tunnel, opened: int) -> None:
        self._watched.discard(tunnel)
        if tunnel.core.streams or tunnel not in self._keys:
            return
        if tunnel.opened == opened:
            self._remove(tunnel)
            tunnel.close()
        else:
            self._watch(tunnel)
