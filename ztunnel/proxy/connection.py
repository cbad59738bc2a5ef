"""The edge of one connection: from accept to its one access-log line, whatever happens between.

`Connection` holds what all kinds share: record, metrics, and an end that comes exactly once. Work
that must wait runs in a task through `wait_for`, whose every outcome, also being cancelled, becomes
that end; nothing escapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.errors import DrainError, UnreachableError, ZtunnelError
from ztunnel.telemetry.access_log import Direction
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.socket_relay import SocketRelay

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.model.flow import Flow
    from ztunnel.model.network import Endpoint
    from ztunnel.proxy.context import NodeContext, ProxyContext
    from ztunnel.proxy.labels import Description
    from ztunnel.telemetry.access_log import Record
    from ztunnel.telemetry.traffic import Traffic
    from ztunnel.transport.dial import Dial

log = get("proxy")


def refuse_early(node: NodeContext, direction: Direction, error: ZtunnelError) -> None:
    """Count a connection that ended before everything about it was known (17.37)."""
    reporter = Reporter.SOURCE if direction is Direction.OUTBOUND else Reporter.DESTINATION
    node.metrics.refused.count(reporter, error.reason).add(1)


class InternalError(ZtunnelError):
    """A bug of ours ended this connection."""

    reason = "internal"


class Connection:
    """One connection through us."""

    __slots__ = (
        "_counted",
        "_dial",
        "_relay",
        "_traffic",
        "actual",
        "context",
        "flow",
        "is_over",
        "record",
        "source",
    )

    def __init__(self, context: ProxyContext, source: Endpoint, record: Record) -> None:
        self.context = context
        self.source = source
        self.actual: Endpoint | None = None
        self.record = record
        self.flow: Flow | None = None  # what policy judged; always None outbound
        self.is_over = False
        self._traffic: Traffic | None = None
        self._counted = (0, 0)
        self._dial: Dial | None = None
        self._relay: StreamRelay | SocketRelay | None = None

    # What the connection dump shows, unless a kind knows better.

    @property
    def original(self) -> str | None:
        """What the other end asked for; None as long as it named nothing."""
        return None

    @property
    def protocol(self) -> str:
        """`TCP` as long as nobody's identity is known."""
        return "TCP"

    # Its life.

    def opened(self, description: Description) -> None:
        """Say who is at both ends; counts the connection."""
        traffic = self._traffic = self.context.node.metrics.traffic.traffic(description.labels)
        traffic.opened()
        self.record.opened(description.ends)

    def moved(self) -> tuple[int, int]:
        """Return the bytes moved so far: from the client, from the server."""
        match self._relay:
            case StreamRelay(read_bytes=read, written_bytes=written):
                return read, written
            case SocketRelay(sent_bytes=sent, received_bytes=received):
                return sent, received
            case _:
                return 0, 0

    @property
    def is_half_open(self) -> bool:
        """Whether one end has finished and the other has not."""
        return self._relay is not None and self._relay.is_half_open

    def cut(self, error: ZtunnelError) -> None:
        """End now, whatever it is doing."""
        if self._relay is not None and not self.is_over:
            self._relay.cut(error)
        else:
            self.end(error)

    def count(self) -> bool:
        """Add to the metrics what moved since the last time; say whether anything did."""
        return self._add(self.moved())

    def _add(self, moved: tuple[int, int]) -> bool:
        received, sent = moved
        more_received, more_sent = received - self._counted[0], sent - self._counted[1]
        self._counted = moved
        if self._traffic is not None:
            self._traffic.add(more_received, more_sent)
        return bool(more_received or more_sent)

    def end(self, error: ZtunnelError | None) -> None:
        """Conclude: release everything, count, and write the line. Later calls do nothing."""
        if self.is_over:
            return
        self.is_over = True
        moved = self.moved()
        self._add(moved)
        self.record.bytes_from_client, self.record.bytes_from_server = moved
        self.release(error)
        if self._traffic is not None:
            self._traffic.closed("-" if error is None else error.response_flag)
        elif error is not None:
            refuse_early(self.context.node, self.record.direction, error)
        self.record.finish(trio.current_time(), error)

    def release(self, error: ZtunnelError | None) -> None:  # noqa: ARG002 - kinds that answer need it
        """Let go of what was begun; called once, by `end`. Each kind adds what it holds itself."""
        self.context.live.remove(self)
        if self._dial is not None:
            self._dial.cancel()

    def attempt(self, step: Callable[[], None], *, trouble: str) -> None:
        """Take a step that does not wait; its failure ends the connection, and nothing else.

        `trouble` is what the reference says before what the kernel said.
        """
        try:
            step()
        except ZtunnelError as error:
            self.end(error)
        except OSError as error:
            self.end(UnreachableError(f"{trouble}: {error.strerror}"))
        except Exception as error:  # the boundary of one connection: it ends alone
            log.exception("connection failed unexpectedly")
            self.end(InternalError(f"internal error: {error}"))

    def wait_for(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` in a task of its own; its failure ends the connection."""

        async def contained() -> None:
            try:
                await work()
            except ZtunnelError as error:
                self.end(error)
            except OSError as error:
                self.end(UnreachableError(f"io error: {error.strerror}"))
            except trio.Cancelled:
                self.end(DrainError("connection closed due to connection drain"))
                raise
            except Exception as error:  # the boundary of one connection: it ends alone
                log.exception("connection failed unexpectedly")
                self.end(InternalError(f"internal error: {error}"))

        self.context.spawn(contained)
