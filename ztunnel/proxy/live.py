"""Connections in progress: to show, to judge again, and to cut (dataplane.md 9.4 and 10.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from ztunnel.errors import ZtunnelError
    from ztunnel.model.flow import Flow
    from ztunnel.model.network import Endpoint
    from ztunnel.telemetry.access_log import Record


class Shown(Protocol):
    """What operators see of a connection in progress."""

    @property
    def source(self) -> Endpoint:
        """Who called."""

    @property
    def original(self) -> str | None:
        """What the caller asked for: an address outbound, a host name or nothing inbound."""

    @property
    def actual(self) -> Endpoint | None:
        """Where it went; None while that is being found out."""

    @property
    def protocol(self) -> str:
        """`HBONE`, `TCP` or `DOUBLEHBONE`."""


class Live(Shown, Protocol):
    """A connection in progress."""

    @property
    def flow(self) -> Flow | None:
        """What policy judged; None before it has, and always outbound."""

    @property
    def record(self) -> Record:
        """What its log line will say."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""

    @property
    def is_half_open(self) -> bool:
        """Whether one end has finished and the other has not."""

    def count(self) -> bool:
        """Add to the metrics what moved since the last time; say whether anything did."""

    def cut(self, error: ZtunnelError) -> None:
        """End it now."""


class LiveConnections:
    """The connections in progress of one workload, in order of arrival."""

    __slots__ = ("_emptied", "inbound", "outbound")

    def __init__(self) -> None:
        self.inbound: dict[Live, None] = {}
        self.outbound: dict[Live, None] = {}
        self._emptied = trio.Event()

    def __len__(self) -> int:
        return len(self.inbound) + len(self.outbound)

    def remove(self, connection: Live) -> None:
        """Forget a connection that has ended; one never added is fine."""
        self.inbound.pop(connection, None)
        self.outbound.pop(connection, None)
        if not self:
            self._emptied.set()

    async def empty(self) -> None:
        """Wait until there are none."""
        while self:
            self._emptied = trio.Event()
            await self._emptied.wait()
        await trio.lowlevel.checkpoint()

    def cut_all(self, error: ZtunnelError) -> None:
        """End all of them now."""
        for connection in [*self.inbound, *self.outbound]:
            connection.cut(error)
