"""The link to the control plane: connect, feed the session, apply to the store, come back.

How `app.py` uses it:

    demand = Demand(store, metrics=metrics) if config.xds_on_demand else None
    client = xds_client(config, store, metrics=metrics, rng=rng, on_ready=on_ready, demand=demand)
    await nursery.start(client.run)

`start` returns, and `on_ready` is called, when the first response of every type was handled: only
then may pods be served (state-and-xds.md 4.6). `start_soon` serves who does not want to wait. It
runs until cancelled and raises nothing that the control plane could cause. Without an address of a
control plane do not make one. When a stream ends, everything we know stays and keeps serving.

A response is applied in small steps, which take turns with connections (`transport.pace`), so that
those are not held up by a first sync of a whole mesh.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from random import Random
from typing import NoReturn, Protocol, assert_never

import structlog
import trio

from ztunnel.config import Config
from ztunnel.errors import CallError, LimitError, ResourceError
from ztunnel.model.policy import Policy
from ztunnel.model.service import Service
from ztunnel.model.workload import PolicyKey, ServiceKey, Workload, WorkloadUid
from ztunnel.state.settling import Settling
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.metrics import Metrics
from ztunnel.transport.grpc import GrpcClient
from ztunnel.transport.grpc_access import LOCAL, GrpcAccess
from ztunnel.transport.pace import Pace
from ztunnel.wire.delta import (
    ADS_PATH,
    Arrived,
    DeltaSession,
    Handled,
    Outgoing,
    Paused,
    Step,
    Subscription,
)
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.xds.backoff import Backoff
from ztunnel.xds.demand import Demand
from ztunnel.xds.node import node_info

UNKNOWN_TYPE = "unknown"  # as a metric's label: a peer must not invent labels

# Statuses of a stream that broke on its way, for the metric (4.5); others are the server's answer.
_BROKEN = frozenset({"UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"})

log = structlog.get_logger(component="xds")


class Stream(Protocol):
    """A bidirectional call, see `transport.grpc.MessageStream`."""

    @property
    def has_answered(self) -> bool:
        """Whether any message was received."""

    def send(self, *pieces: bytes) -> None:
        """Send a message, in pieces or not, some time soon."""

    async def receive(self) -> bytes | bytearray | None:
        """Return the next message, None at the end; raises CallError."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a stream ended; `reason` is the metric's label."""

    reason: str
    error: str
    lived_seconds: float


def xds_client(
    config: Config,
    store: Store,
    *,
    metrics: Metrics,
    rng: Random,
    on_ready: Callable[[], None] = lambda: None,
    demand: Demand | None = None,
    pace: Pace | None = None,
) -> XdsClient:
    """Make a client that keeps the store in line with the configured control plane.

    With `demand` addresses are fetched only when they are asked for there.
    """
    server = GrpcClient(GrpcAccess.for_xds(config), pace)
    subscriptions = [Subscription(ADDRESS_TYPE, demand is None), Subscription(AUTHORIZATION_TYPE)]
    return XdsClient(
        DeltaSession(node_info(config), subscriptions),
        store,
        connect=lambda: server.stream(ADS_PATH),
        metrics=metrics,
        rng=rng,
        on_ready=on_ready,
        demand=demand,
        pace=pace,
    )


class XdsClient:
    """One session with the control plane, over one stream after the other."""

    def __init__(
        self,
        session: DeltaSession,
        store: Store,
        *,
        connect: Callable[[], AbstractAsyncContextManager[Stream]],
        metrics: Metrics,
        rng: Random,
        on_ready: Callable[[], None],
        demand: Demand | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._session = session
        self._pace = pace or Pace()
        self._store = store
        self._connect = connect
        self._metrics = metrics
        self._backoff = Backoff(rng)
        self._on_ready = on_ready
        self._demand = demand
        self._is_ready = False
        self._synced: Callable[[], None] = on_ready
        self._connections = 0
        self._healthy_since = math.inf  # when this stream brought its first response
        self._settling = Settling()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Connect again and again until cancelled; started once the first sync is done."""

        def synced() -> None:
            self._on_ready()
            task_status.started()

        self._synced = synced
        gc.freeze()  # the program itself: a walk over it alone is a stall of 15 ms
        while True:
            self._connections += 1
            ended = await self._serve_once()
            self._metrics.xds_terminations.count(ended.reason).add()
            wait = self._backoff.after(ended.lived_seconds)
            level = log.info if ended.lived_seconds else log.warning
            level(
                "control plane connection ended",
                connection=self._connections,
                reason=ended.reason,
                error=ended.error,
                retry_seconds=round(wait, 3),
            )
            await trio.sleep(wait)

    async def _serve_once(self) -> _Ended:
        self._healthy_since = math.inf
        ended: _Ended | None = None
        try:
            async with self._connect() as stream:
                ended = await self._talk(stream)
        except CallError as exc:
            return _Ended(_reason(exc, has_answered=False), str(exc), 0.0)
        assert ended is not None
        return ended

    async def _talk(self, stream: Stream) -> _Ended:
        """Serve one stream, and say how it ended."""
        reason, error = "Complete", ""
        try:
            await self._converse(stream)
        except CallError as exc:
            reason, error = _reason(exc, has_answered=stream.has_answered), str(exc)
        except (ResourceError, LimitError) as exc:
            reason, error = "Error", str(exc)
        finally:
            if self._demand is not None:
                self._demand.detach()
        return _Ended(reason, error, max(0.0, trio.current_time() - self._healthy_since))

    async def _converse(self, stream: Stream) -> None:
        """Serve one stream until the server ends it.

        Raises:
            CallError | ResourceError | LimitError: it broke, or must be given up.
        """
        wanted = self._demand.names if self._demand is not None else ()
        await self._take(self._session.connect(tuple(wanted)), stream)
        if self._demand is not None:
            self._demand.attach(_Questions(self._session, stream))
        log.info("subscribed to control plane", connection=self._connections)
        while (message := await stream.receive()) is not None:
            self._healthy_since = min(self._healthy_since, trio.current_time())
            await self._take(self._session.receive(message), stream)

    async def _take(self, steps: Iterator[Step], stream: Stream) -> None:
        """Do the session's steps, in turns with connections."""
        await self._pace.through(self._doing(steps, stream))

    def _doing(self, steps: Iterator[Step], stream: Stream) -> Iterator[None]:
        for step in steps:
            match step:
                case Outgoing(pieces):
                    stream.send(*pieces)
                case Arrived():
                    yield from self._store.applying(as_update(step))
                    self._settling.came(len(step.resources))
                case Handled():
                    self._settling.ended()
                    self._note(step)
                case Paused():
                    pass
                case _:
                    assert_never(step)
            yield

    def _note(self, handled: Handled) -> None:
        """Count, log and tell what came of a response."""
        url = handled.type_url or UNKNOWN_TYPE
        self._metrics.xds_messages.count(url).add()
        self._metrics.xds_bytes.count(url).add(handled.value_bytes)
        if handled.rejections:
            self._metrics.xds_rejected.count(url).add(handled.rejections)
            log.error(
                "control plane sent what we cannot use",
                type=url,
                resources=handled.rejections,
                errors=list(handled.rejected),
            )
        if handled.notes:
            log.warning("control plane sent unknown values", type=url, notes=list(handled.notes))
        log.debug("control plane response", type=url, resources=handled.resources)
        if self._demand is not None and handled.type_url == ADDRESS_TYPE:
            self._demand.answered(handled.answered)
        if self._session.is_synced and not self._is_ready:
            self._is_ready = True
            log.info("first sync with control plane done", workloads=len(self._store.workloads))
            self._synced()


class _Questions:
    """On-demand questions on one stream."""

    def __init__(self, session: DeltaSession, stream: Stream) -> None:
        self._session = session
        self._stream = stream

    def ask(self, names: Collection[str]) -> None:
        for request in self._session.ask(names):
            self._stream.send(request)

    def forget(self, names: Collection[str]) -> None:
        for request in self._session.forget(names):
            self._stream.send(request)


def as_update(arrived: Arrived) -> Update:
    """Say what arrived in the words of the store.

    A removed address is a service if its name is `namespace/hostname`, and may be a workload in
    any case; the store does not mind names it does not know (4.4).
    """
    if arrived.type_url == AUTHORIZATION_TYPE:
        return Update(
            policies=[found for found in arrived.resources if isinstance(found, Policy)],
            removed_policies=[PolicyKey(name) for name in arrived.removed],
        )
    return Update(
        workloads=[found for found in arrived.resources if isinstance(found, Workload)],
        services=[found for found in arrived.resources if isinstance(found, Service)],
        removed_workloads=[WorkloadUid(name) for name in arrived.removed],
        removed_services=[ServiceKey(name) for name in arrived.removed if name.count("/") == 1],
    )


def _reason(failure: CallError, *, has_answered: bool) -> str:
    """Name the end of a stream as the reference's metric does (4.5)."""
    if failure.status == LOCAL:
        return "Error"
    if not has_answered:
        return "ConnectionError"
    return "Reconnect" if failure.status in _BROKEN else "Error"
