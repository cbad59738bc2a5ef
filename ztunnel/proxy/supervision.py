"""Looking after the connections in progress of one workload: policy, byte counts, idleness."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from ztunnel.decide.authorize import Refusal, authorize
from ztunnel.errors import DeniedError, LimitError
from ztunnel.proxy.connection import InternalError
from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.proxy.live import Live
    from ztunnel.state.store import Changes

log = get("proxy")

COUNT_SECONDS = 5.0  # how often the bytes of long connections reach the metrics
SLICE = 25  # connections looked at before others get their turn: a fifth of a millisecond


class Supervisor:
    """Judges, counts and, where the operator set a limit, ends connections."""

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self._changed = trio.Event()
        self._judged_for: Workload | None = None  # what we served when all were last judged
        # When a connection last moved bytes, and when half of it was last seen open.
        self._idle_since: dict[Live, float] = {}
        self._half_since: dict[Live, float] = {}

    async def run(self) -> None:
        """Supervise until cancelled."""
        stop = self._context.node.store.subscribe(self._on_change)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._judge_again)
                nursery.start_soon(self._count)
                await trio.sleep_forever()
        finally:
            stop()

    def _on_change(self, changes: Changes) -> None:
        # Workloads change all the time, but only ours decides who may be connected to it.
        is_ours = changes.workloads and self._context.workload() is not self._judged_for
        if changes.policies or is_ours:
            self._changed.set()

    async def _judge_again(self) -> None:
        """Ask policy about every inbound connection after each change of policy or our workload.

        The workload is looked up anew, unlike in the reference: turning on STRICT changes it.
        """
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            self._judged_for = self._context.workload()
            live = list(self._context.live.inbound)
            for number, connection in enumerate(live):
                if number % SLICE == SLICE - 1:
                    await trio.lowlevel.checkpoint()
                self._contain(self._judge, connection)

    @staticmethod
    def _contain(look: Callable[[Live], None], connection: Live) -> None:
        """Look at a connection; if that fails, end it: nobody knows whether it is allowed."""
        try:
            look(connection)
        except Exception as error:  # the boundary of one connection: it ends alone
            log.exception("looking after a connection failed unexpectedly")
            connection.cut(InternalError(f"internal error: {error}"))

    def _judge(self, connection: Live) -> None:
        workload, flow = self._context.workload(), connection.flow
        if flow is None or workload is None or connection.is_over:
            return
        verdict = authorize(flow, self._context.node.store.policies.for_workload(workload))
        if not isinstance(verdict, Refusal):
            return
        if verdict.policy is not None:
            connection.record.policy = verdict.policy.key
        log.info(
            "connection closed because it's no longer allowed after a policy update",
            source=str(connection.source),
            reason=verdict.reason,
        )
        connection.cut(DeniedError("connection closed due to policy change"))

    async def _count(self) -> None:
        while True:
            await trio.sleep(COUNT_SECONDS)
            live = self._context.live
            now = trio.current_time()
            for number, connection in enumerate([*live.inbound, *live.outbound]):
                if number % SLICE == SLICE - 1:
                    await trio.lowlevel.checkpoint()
                if not connection.is_over:
                    self._contain(partial(self._look_at, now=now), connection)
            self._forget(live.inbound, live.outbound)

    def _look_at(self, connection: Live, now: float) -> None:
        config = self._context.node.config
        if connection.count() or connection not in self._idle_since:
            self._idle_since[connection] = now
        idle = now - self._idle_since[connection]
        if not connection.is_half_open:
            self._half_since.pop(connection, None)
        half = now - self._half_since.setdefault(connection, now) if connection.is_half_open else 0
        for seconds, limit, name in (
            (idle, config.idle_seconds, "idle"),
            (half, config.half_open_seconds, "half open"),
        ):
            if limit and seconds >= limit:
                self._context.node.metrics.limits_reached.count(name.replace(" ", "_")).add(1)
                connection.cut(LimitError(f"connection {name} for {seconds:.0f}s"))
                return

    def _forget(self, *live: Iterable[Live]) -> None:
        known = set().union(*live)
        for since in (self._idle_since, self._half_since):
            for gone in [connection for connection in since if connection not in known]:
                del since[gone]
