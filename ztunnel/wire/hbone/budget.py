"""Patience with a peer, counted without a clock.

A core has no time, so a flood is told from a busy peer by what comes with it. A budget is refilled
a little by every read (a peer that trickles pays a read, and so a packet, for every few frames) and
by useful work (streams that finish, DATA that we send). A flood packs thousands of worthless frames
into few reads and runs dry; a connection that idles for weeks on keep-alive pings never does.
"""

from __future__ import annotations

from h2.errors import ErrorCodes

from ztunnel.errors import TunnelError


class Budget:
    """A bucket of tokens; `left` may be raised by its owner and is cut to `most` at each refill."""

    __slots__ = ("left", "most", "per_read")

    def __init__(self, most: int, *, per_read: int) -> None:
        self.left = most
        self.most = most
        self.per_read = per_read

    def refill(self) -> None:
        """Add what one read earns."""
        self.left += self.per_read
        if self.left > self.most:  # noqa: PLR1730 - every read pays
            self.left = self.most

    def spend(self, what: str, *, cost: int = 1) -> None:
        """Pay for one worthless frame.

        Raises:
            TunnelError: ENHANCE_YOUR_CALM, the budget is exhausted; `what` says by which frame.
        """
        self.left -= cost
        if self.left < 0:
            raise TunnelError(f"too many {what}", code=ErrorCodes.ENHANCE_YOUR_CALM)
