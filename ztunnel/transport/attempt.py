"""One dial for a tunnel, and everyone who waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ztunnel.errors import (
    DrainError,
    PeerTimeoutError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.transport.pool import Pool, PoolKey
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.tunnel import Tunnel

log = get("transport")

LEAVING_MOST = 4
"""How often in a row a dial may meet a process that drains, while others listen on its port."""


class Dialling(Protocol):
    """A dial under way."""

    def cancel(self) -> None:
        """Give up without telling."""


class TunnelDial(Protocol):
    """Makes a tunnel: TCP, TLS, identity check."""

    def __call__(self, key: PoolKey, permit: Permit, attempt: Attempt) -> Dialling:
        """Begin; returns at once, and tells `attempt` later how it went.

        Raises:
            Exception: it went wrong already.
        """


class Waiter(Protocol):
    """Who wants to open a stream."""

    def on_tunnel(self, tunnel: Tunnel) -> None:
        """Open it, now: later the place may have gone to another."""

    def on_no_tunnel(self, error: ZtunnelError) -> None:
        """Learn why there is none."""


class Attempt:
    """One dial, until the peer's settings are there; only then is its limit of streams known."""

    __slots__ = (
        "_deadline",
        "_dial",
        "_dialling",
        "_over",
        "_pool",
        "_reactor",
        "_tries",
        "_tunnel",
        "key",
        "permit",
        "waiting",
    )

    def __init__(
        self,
        reactor: Reactor,
        pool: Pool,
        dial: TunnelDial,
        key: PoolKey,
        permit: Permit,
        *,
        seconds: float,
    ) -> None:
        self.key = key
        self.permit = permit
        self.waiting: list[tuple[Waiter, Permit]] = []
        self._reactor = reactor
        self._pool = pool
        self._dial = dial
        self._dialling: Dialling | None = None
        self._tunnel: Tunnel | None = None
        self._tries = 0
        self._over = False
        self._deadline = reactor.deadline(seconds, lambda: self._too_late(seconds))

    @property
    def pool(self) -> Pool:
        """The owner of the tunnel."""
        return self._pool

    def begin(self) -> None:
        """Dial; nobody is told anything before this returns."""
        self._tries += 1
        try:
            self._dialling = self._dial(self.key, self.permit, self)
        except Exception as error:  # noqa: BLE001 - told, like any other
            failure = error
            self._reactor.soon(lambda: self.on_no_tunnel(failure))

    def cancel(self) -> None:
        """Give up, and tell those who wait."""
        self.fail(DrainError("pool draining"))

    # The dial tells how it went.

    def on_tunnel(self, tunnel: Tunnel) -> None:
        """Wait for the settings of the peer, unless they are there."""
        self._tunnel = tunnel
        if self._over:
            tunnel.close()
        elif tunnel.core.settings_received or tunnel.closed:
            self.settle()
        else:
            self._pool.settling(tunnel, self)

    def on_no_tunnel(self, error: Exception) -> None:
        """Fail."""
        if isinstance(error, ZtunnelError):
            self.fail(error)
        elif isinstance(error, OSError):
            self.fail(UnreachableError(f"io error: {error.strerror}"))
        else:  # the boundary of one dial: its callers end, and nobody else
            peer = str(self.key.peer)
            log.error("dialling a tunnel failed unexpectedly", peer=peer, exc_info=error)
            self.fail(UnreachableError(f"internal error: {error}"))

    def settle(self) -> None:
        """See whether the tunnel is of use; where a peer is just leaving, others have its port."""
        tunnel = self._tunnel
        assert tunnel is not None
        if self._over:
            return
        if tunnel.accepts_streams:
            self._take(tunnel)
        elif tunnel.closed_because is not None:
            self.fail(tunnel.closed_because)
        else:
            tunnel.close()
            if self._tries < LEAVING_MOST:
                self.begin()
            else:
                self.cancel()

    def fail(self, error: ZtunnelError) -> None:
        """End without a tunnel."""
        dialling, tunnel = self._dialling, self._tunnel
        if self._conclude():
            if dialling is not None:
                dialling.cancel()
            if tunnel is not None:
                tunnel.close()
            self._pool.on_failed(self, error)

    def _take(self, tunnel: Tunnel) -> None:
        try:
            self._pool.take_in(self.key, tunnel)
        except ZtunnelError as error:
            self.fail(error)
            return
        if self._conclude():
            self._pool.on_attempted(self, tunnel)

    def _too_late(self, seconds: float) -> None:
        self.fail(
            PeerTimeoutError(
                "connection timed out, maybe a NetworkPolicy is blocking HBONE port "
                f"{self.key.peer.port}: no tunnel to {self.key.peer} within {seconds:g}s"
            )
        )

    def _conclude(self) -> bool:
        was_over, self._over = self._over, True
        self._deadline.cancel()
        self._dialling = None  # it knows us: the two would wait for the garbage collector
        return not was_over
