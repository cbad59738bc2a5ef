"""The proxy of one workload: its listeners, its pool, its connections, from start to stop."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ztunnel.decide.authorize import Refusal, authorize
from ztunnel.decide.classify import INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT
from ztunnel.errors import DeniedError, DrainError, LimitError, ZtunnelError
from ztunnel.linux.sockopt import is_transparent, reset_on_close
from ztunnel.proxy.context import NodeContext, Places, ProxyContext
from ztunnel.proxy.inbound import InboundTunnels
from ztunnel.proxy.outbound import OutboundConnection
from ztunnel.proxy.plaintext import PlaintextConnection
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.listener import Listener
from ztunnel.transport.pool import Pool
from ztunnel.transport.secure_dial import raise_tunnel, reach

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.decide.authorize import Permit
    from ztunnel.model.network import Endpoint
    from ztunnel.proxy.live import Live
    from ztunnel.state.store import Changes
    from ztunnel.transport.pool import PoolKey
    from ztunnel.transport.sockets import Socket, SocketFactory
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.zds import PodInfo

log = get("proxy")

COUNT_SECONDS = 5.0  # how often the bytes of long connections reach the metrics
SLICE = 200  # connections looked at before other tasks get their turn
DRAINED = "connection closed due to connection drain"


@dataclass(frozen=True, slots=True)
class Doors:
    """Where to listen; anything but the default is for proxies that share one machine in tests."""

    host: str = ""  # the wildcard address
    outbound: int = OUTBOUND_PORT
    plaintext: int = INBOUND_PLAINTEXT_PORT
    hbone: int = INBOUND_HBONE_PORT


DOORS = Doors()


class WorkloadProxy:
    """Serves one workload. `start` binds everything or nothing; then `run`."""

    def __init__(self, node: NodeContext, info: PodInfo, sockets: SocketFactory) -> None:
        self._node = node
        self._spawned: trio.Nursery | None = None
        self._rejudge = trio.Event()
        self._draining = False
        self.context = ProxyContext(
            node=node,
            info=info,
            sockets=sockets,
            spawn=self._spawn,
            connections=Places(node.config.max_connections_per_pod),
        )
        self.pool = Pool(
            node.reactor,
            self._dial_tunnel,
            self._spawn,
            streams_per_tunnel=node.config.pool_max_streams,
            idle_seconds=node.config.pool_unused_release_seconds,
            dial_seconds=node.config.tls_handshake_seconds + 10.0,
        )
        self.tunnels = InboundTunnels(self.context)
        self._listeners: list[Listener] = []

    @property
    def addresses(self) -> dict[str, Endpoint]:
        """Where it listens, by component."""
        return {listener.component: listener.address for listener in self._listeners}

    def start(self, doors: Doors = DOORS) -> None:
        """Bind all listeners, or none.

        Raises:
            ConfigError: a port is taken or may not be used; nothing is left bound.
        """
        wanted_doors: list[tuple[int, str, Callable[[Socket, Endpoint], None]]] = [
            (doors.outbound, "outbound", self._accept_outbound),
            (doors.plaintext, "inbound plaintext", self._accept_plaintext),
            (doors.hbone, "inbound", self.tunnels.serve),
        ]
        wanted = self._node.config.original_source
        with contextlib.ExitStack() as undo:
            bound = []
            for port, component, accept in wanted_doors:
                sock = self.context.sockets.listen(port, transparent=wanted, host=doors.host)
                undo.callback(sock.close)
                bound.append((sock, component, accept))
            undo.pop_all()
        self.context.original_source = all(is_transparent(sock) for sock, _, _ in bound)
        for sock, component, accept in bound:
            listener = Listener(self._node.reactor, sock, accept, component=component)
            self._listeners.append(listener)
            log.info(
                "listener established",
                address=str(listener.address),
                component=component,
                transparent=self.context.original_source,
            )

    async def run(self) -> None:
        """Serve until cancelled or drained; then every connection has ended."""
        stop = self._node.store.subscribe(self._on_change)
        try:
            async with trio.open_nursery() as nursery:
                self._spawned = nursery
                nursery.start_soon(self._judge_again)
                nursery.start_soon(self._count_bytes)
                await trio.sleep_forever()
        finally:
            stop()
            self._spawned = None
            self._close_everything()

    async def drain(self, seconds: float) -> None:
        """Stop accepting, say goodbye, and wait up to `seconds` for what is in progress.

        The caller cancels `run` afterwards, which cuts what is left.
        """
        self._draining = True
        self._close_listeners()
        self.tunnels.drain()
        with trio.move_on_after(seconds) as scope:
            await self.context.live.empty()
        if scope.cancelled_caught:
            log.warning(
                "drain duration expired with pending connections, forcefully shutting down",
                connections=len(self.context.live),
            )

    # Accepting.

    def _accept_outbound(self, sock: Socket, source: Endpoint) -> None:
        if self._has_place(sock, source, Direction.OUTBOUND):
            self._node.metrics.sockets_open(Reporter.SOURCE).add(1)
            OutboundConnection(self.context, self.pool, sock, source).serve()

    def _accept_plaintext(self, sock: Socket, source: Endpoint) -> None:
        if self._has_place(sock, source, Direction.INBOUND):
            self._node.metrics.sockets_open(Reporter.DESTINATION).add(1)
            PlaintextConnection(self.context, sock, source).serve()

    def _has_place(self, sock: Socket, source: Endpoint, direction: Direction) -> bool:
        places = self.context.connections
        if places.take():
            return True
        reset_on_close(sock)
        sock.close()
        self._node.metrics.limits_reached.count("connections_per_pod").add(1)
        now = trio.current_time()
        record = Record(log=self._node.access_log, direction=direction, source=source, started=now)
        record.finish(now, LimitError(f"the pod has {places.most} connections already"))
        return False

    # Tasks.

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        assert self._spawned is not None
        self._spawned.start_soon(work)

    async def _dial_tunnel(self, key: PoolKey, permit: Permit, owner: Pool) -> Tunnel:
        node = self._node
        certificate = await node.certificates.certificate_for(key.source)
        sock = await reach(self.context.sockets, permit, key.peer)
        return await raise_tunnel(
            node.reactor,
            sock,
            node.tls.client(certificate),
            key.expected,
            owner,
            settings=node.client_settings,
        )

    def _on_change(self, changes: Changes) -> None:
        if changes.policies or changes.workloads:
            self._rejudge.set()

    async def _judge_again(self) -> None:
        """Ask policy about every inbound connection after each change of policy or workload."""
        while True:
            await self._rejudge.wait()
            self._rejudge = trio.Event()
            for number, connection in enumerate(list(self.context.live.inbound)):
                if number % SLICE == SLICE - 1:
                    await trio.lowlevel.checkpoint()
                workload, flow = self.context.workload(), connection.flow
                if flow is None or workload is None:
                    continue
                policies = self._node.store.policies.for_workload(workload)
                verdict = authorize(flow, policies)
                if isinstance(verdict, Refusal):
                    self._close_denied(connection, verdict)

    def _close_denied(self, connection: Live, refusal: Refusal) -> None:
        if refusal.policy is not None:
            connection.record.policy = refusal.policy.key
        log.info(
            "connection closed because it's no longer allowed after a policy update",
            source=str(connection.source),
            reason=refusal.reason,
        )
        connection.cut(DeniedError("connection closed due to policy change"))

    async def _count_bytes(self) -> None:
        while True:
            await trio.sleep(COUNT_SECONDS)
            live = self.context.live
            for number, connection in enumerate([*live.inbound, *live.outbound]):
                if number % SLICE == SLICE - 1:
                    await trio.lowlevel.checkpoint()
                if not connection.is_over:
                    connection.count()

    # Ending.

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _close_everything(self) -> None:
        error: ZtunnelError = DrainError(DRAINED)
        self._close_listeners()
        self.context.live.cut_all(error)
        self.tunnels.close(error)
        self.pool.close()
