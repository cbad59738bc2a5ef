"""The proxy of one workload: its listeners, its pool, its connections, from start to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from ztunnel.decide.classify import (
    INBOUND_HBONE_PORT,
    INBOUND_PLAINTEXT_PORT,
    OUTBOUND_PORT,
    SOCKS5_PORT,
)
from ztunnel.errors import DrainError, LimitError, ZtunnelError
from ztunnel.linux.sockopt import is_transparent, reset_on_close
from ztunnel.proxy.certificates import TunnelWarden, is_current
from ztunnel.proxy.context import NodeContext, Places, ProxyContext
from ztunnel.proxy.dialling import TunnelDialling
from ztunnel.proxy.inbound import InboundTunnels
from ztunnel.proxy.outbound import OutboundConnection
from ztunnel.proxy.plaintext import PlaintextConnection
from ztunnel.proxy.socks import SocksConnection
from ztunnel.proxy.supervision import Supervisor
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter
from ztunnel.transport.dial import CONNECT_SECONDS
from ztunnel.transport.listener import Listener
from ztunnel.transport.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ztunnel.decide.authorize import Permit
    from ztunnel.dns.server import DnsServer
    from ztunnel.model.network import Endpoint
    from ztunnel.transport.attempt import Attempt
    from ztunnel.transport.pool import PoolKey
    from ztunnel.transport.sockets import Socket, SocketFactory
    from ztunnel.wire.zds import PodInfo

log = get("proxy")

LOOPBACK = "127.0.0.1"
STAGGER_SHARE = 0.2  # of the time to drain, for cutting what did not end by itself
STAGGER_SECONDS_MOST = 5.0
DRAINED = "connection closed due to connection drain"


Accept = Callable[["Socket", "Endpoint"], None]


@dataclass(frozen=True, slots=True)
class Doors:
    """Where to listen; anything but the default is for proxies that share one machine in tests."""

    host: str = ""  # the wildcard address
    outbound: int | None = OUTBOUND_PORT
    plaintext: int | None = INBOUND_PLAINTEXT_PORT
    hbone: int | None = INBOUND_HBONE_PORT
    socks: int | None = SOCKS5_PORT
    dns: bool = True
    spoof: bool = True  # keep the caller's address towards the application, where that works


DOORS = Doors()
OWN_DOORS = Doors(outbound=None, plaintext=None, socks=None, dns=False, spoof=False)
"""In front of the node proxy's own endpoints: tunnels only (dataplane.md 3.11)."""


class WorkloadProxy:
    """Serves one workload. `start` binds everything or nothing; then `run`."""

    def __init__(self, node: NodeContext, info: PodInfo, sockets: SocketFactory) -> None:
        self._node = node
        self._spawned: trio.Nursery | None = None
        self._early: list[Callable[[], Awaitable[None]]] = []  # came between `start` and `run`
        self.context = ProxyContext(
            node=node,
            info=info,
            sockets=sockets,
            spawn=self._spawn,
            connections=Places(node.config.max_connections_per_pod),
        )
        self.pool = self._make_pool()
        self.tunnels = InboundTunnels(self.context)
        self._socks_pool = self._make_pool()  # its own, as the reference's (dataplane.md 5)
        self._warden = TunnelWarden(node, (self.pool, self._socks_pool), self.tunnels)
        self._supervisor = Supervisor(self.context)
        self._listeners: list[Listener] = []
        self.dns: DnsServer | None = None  # made by `start`, where it is wanted

    @property
    def addresses(self) -> dict[str, Endpoint]:
        """Where it listens, by component."""
        return {listener.component: listener.address for listener in self._listeners}

    def start(self, doors: Doors = DOORS) -> None:
        """Bind all listeners, or none.

        Raises:
            ConfigError: a port is taken or may not be used; nothing is left bound.
        """
        config = self._node.config
        with contextlib.ExitStack() as undo:
            if config.dns_enabled and doors.dns:
                self.dns = self._make_dns()
                self.dns.start()
                undo.callback(self.dns.close)
            bound = []
            for port, host, component, accept in self._wanted(doors):
                if port is None:
                    continue
                transparent = config.original_source if doors.spoof else False
                sock = self.context.sockets.listen(port, transparent=transparent, host=host)
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

    def _wanted(self, doors: Doors) -> list[tuple[int | None, str, str, Accept]]:
        """List the doors that the operator wants: port, host, component, who takes what comes."""
        if not self._node.config.proxy_enabled:
            return []
        wanted: list[tuple[int | None, str, str, Accept]] = [
            (doors.outbound, doors.host, "outbound", self._accept_outbound),
            (doors.plaintext, doors.host, "inbound plaintext", self._accept_plaintext),
            (doors.hbone, doors.host, "inbound", self.tunnels.serve),
        ]
        if self._node.config.socks5_enabled:
            wanted.append((doors.socks, doors.host or LOOPBACK, "socks5", self._accept_socks))
        return wanted

    def _make_dns(self) -> DnsServer:
        # Two mebibytes that a proxy without DNS does not need.
        from ztunnel.dns.server import DnsServer, DnsSettings  # noqa: PLC0415

        node = self._node
        return DnsServer(
            self.context,
            self.context.info.namespace,
            sockets=self.context.sockets,
            reactor=node.reactor,
            store=node.store,
            metrics=node.metrics,
            settings=DnsSettings.of(node.config),
            rng=node.rng,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled or drained; then every connection has ended."""
        try:
            async with trio.open_nursery() as nursery:
                self._spawned = nursery
                while self._early:
                    nursery.start_soon(self._early.pop())
                nursery.start_soon(self._supervisor.run)
                nursery.start_soon(self._warden.run)
                if self.dns is not None:
                    nursery.start_soon(self.dns.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._spawned = None
            self._close_everything()

    async def drain(self, seconds: float) -> None:
        """Stop accepting, say goodbye, and wait up to `seconds` for what is in progress.

        The caller cancels `run` afterwards, which cuts what is left.
        """
        async with trio.open_nursery() as nursery:
            if self.dns is not None:
                nursery.start_soon(self.dns.drain, seconds)
            await self._drain_connections(seconds)

    async def _drain_connections(self, seconds: float) -> None:
        for listener in self._listeners:
            listener.finish()
        self._listeners.clear()
        self.tunnels.drain()
        stagger = min(STAGGER_SECONDS_MOST, seconds * STAGGER_SHARE)
        with trio.move_on_after(seconds - stagger) as scope:
            await self.context.live.empty()
        if scope.cancelled_caught:
            log.warning(
                "drain duration expired with pending connections, forcefully shutting down",
                connections=len(self.context.live),
            )
            await self._cut_in_a_stagger(stagger)

    async def _cut_in_a_stagger(self, seconds: float) -> None:
        """Cut what is left one after another, so that not all of them reconnect at once (17.13)."""
        left = [*self.context.live.inbound, *self.context.live.outbound]
        for connection in left:
            connection.cut(DrainError(DRAINED))
            await trio.sleep(seconds / len(left))

    # Accepting.

    def _accept_outbound(self, sock: Socket, source: Endpoint) -> None:
        if self._has_place(sock, source, Direction.OUTBOUND):
            OutboundConnection(self.context, self.pool, sock, source).serve()

    def _accept_plaintext(self, sock: Socket, source: Endpoint) -> None:
        if self._has_place(sock, source, Direction.INBOUND):
            PlaintextConnection(self.context, sock, source).serve()

    def _accept_socks(self, sock: Socket, source: Endpoint) -> None:
        if self._has_place(sock, source, Direction.OUTBOUND):
            SocksConnection(self.context, self._socks_pool, sock, source, dns=self.dns).serve()

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
        if self._spawned is None:
            self._early.append(work)
        else:
            self._spawned.start_soon(work)

    def _make_pool(self) -> Pool:
        config = self._node.config
        return Pool(
            self._node.reactor,
            self._dial_tunnel,
            streams_per_tunnel=config.pool_max_streams,
            idle_seconds=config.pool_unused_release_seconds,
            dial_seconds=config.tls_handshake_seconds + CONNECT_SECONDS,
            is_current=partial(is_current, self._node),
            on_gone=partial(self._node.metrics.tunnels.count(Reporter.SOURCE).add, -1),
        )

    def _dial_tunnel(self, key: PoolKey, permit: Permit, attempt: Attempt) -> TunnelDialling:
        dialling = TunnelDialling(self.context, key, permit, attempt)
        dialling.start()
        return dialling

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
        self._socks_pool.close()
