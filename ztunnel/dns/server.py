"""The DNS server of one pod: UDP and TCP on its loopback (dns-and-observability.md 2.1).

How it works: the node agent redirects what the pod sends to port 53 of anybody. Whom the pod meant
is what a query that is not ours needs to know: for TCP the kernel tells it from the connection, for
UDP we ask connection tracking. Where it does not tell (nothing was redirected, or no such table),
the resolvers of our own resolv.conf are asked, which is all that the reference ever does.

A query by UDP costs no task: its answer is sent in the turn of the reactor in which it came.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import trio

from ztunnel.dns.meant import Meant
from ztunnel.dns.resolv_conf import ResolvConf
from ztunnel.dns.resolver import Naming, Pending, Resolver, Transport
from ztunnel.dns.stream import StreamQueries
from ztunnel.dns.upstream import QUERIES_MAX, Upstream
from ztunnel.linux.conntrack import Conntrack
from ztunnel.linux.sockopt import original_destination
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Endpoint
from ztunnel.model.settings import ProxyMode
from ztunnel.telemetry.log import get
from ztunnel.transport.datagram import DatagramListener, bind_datagram, loopback_has_ipv6
from ztunnel.transport.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.config import Config
    from ztunnel.dns.resolver import Client, Forwarded
    from ztunnel.dns.upstream import Outcome
    from ztunnel.state.store import Store
    from ztunnel.telemetry.metrics import Metrics
    from ztunnel.transport.datagram import SocketAddress
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import Socket, SocketFactory

log = get("dns")

COMPONENT = "dns"
CONNECTIONS_MAX = 128  # TCP, per pod
RESOLV_CONF = Path("/etc/resolv.conf")
_V6 = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsSettings:
    """What the operator chose."""

    addresses: tuple[Endpoint, ...]
    cluster_domain: str = "cluster.local"
    preferred_namespace: Namespace | None = None
    ipv6: bool = True
    resolv_conf: Path = RESOLV_CONF
    is_pods_own: bool = False  # whether resolv.conf is: we are one pod's proxy, inside it

    @classmethod
    def of(cls, config: Config) -> Self:
        """Take them from the configuration."""
        preferred = config.preferred_service_namespace
        return cls(
            addresses=config.dns_addresses,
            cluster_domain=config.cluster_domain,
            preferred_namespace=Namespace(preferred) if preferred else None,
            ipv6=config.ipv6_enabled,
            is_pods_own=config.mode is ProxyMode.DEDICATED,
        )


class DnsServer:
    """Serves one pod. `start` binds everything or nothing; then `run`."""

    def __init__(
        self,
        client: Client,
        namespace: Namespace,
        *,
        sockets: SocketFactory,
        reactor: Reactor,
        store: Store,
        metrics: Metrics,
        settings: DnsSettings,
        rng: random.Random,
    ) -> None:
        """Serve `client`, whose namespace the node agent vouches for; reads resolv.conf."""
        self._sockets = sockets
        self._reactor = reactor
        self._metrics = metrics
        self._settings = settings
        conf = self._read_resolv_conf()
        self._fallback = conf.servers
        naming = Naming(
            namespace=namespace,
            cluster_domain=settings.cluster_domain,
            preferred_namespace=settings.preferred_namespace,
            ipv6=settings.ipv6,
            search=conf.search if settings.is_pods_own else None,
        )
        self.resolver = Resolver(
            client=client, naming=naming, store=store, metrics=metrics, rng=rng,
            # Not `rng`: who can predict an id can forge an answer.
            upstream=Upstream(sockets, reactor, random.SystemRandom()),
        )  # fmt: skip
        self._bound: list[tuple[Socket, Socket]] = []
        self._datagrams: list[DatagramListener] = []
        self._listeners: list[Listener] = []
        self._meant = Meant(None, ())
        self._tasks: trio.Nursery | None = None
        # A query that is asked again while it is under way will be answered once.
        self._under_way: set[tuple[SocketAddress, bytes]] = set()
        self._connections = 0
        self._rested = trio.Event()

    @property
    def addresses(self) -> list[Endpoint]:
        """Where it listens, by UDP and TCP alike."""
        return [Endpoint.of(sock.getsockname()) for sock, _ in self._bound]

    def start(self) -> None:
        """Bind UDP and TCP, or nothing; IPv6 where the pod's loopback has it.

        IPV6_ENABLED does not matter here: queries are redirected in both families regardless.

        Raises:
            ConfigError: a port is taken or may not be used; nothing is left bound.
        """
        has_ipv6 = loopback_has_ipv6(self._sockets)
        with contextlib.ExitStack() as undo:
            for address in self._settings.addresses:
                if address.ip.version == _V6 and not has_ipv6:
                    continue
                stream = undo.enter_context(
                    self._sockets.listen(address.port, transparent=False, host=str(address.ip))
                )
                here = Endpoint.of(stream.getsockname())
                self._bound.append((undo.enter_context(bind_datagram(self._sockets, here)), stream))
                undo.callback(self._bound.clear)
            undo.pop_all()
        self._meant = Meant(self._open_conntrack(), self._fallback)
        for address in self.addresses:
            log.info("listener established", address=str(address), component=COMPONENT)

    async def run(self) -> None:
        """Serve until cancelled; then everything is closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                for datagrams, stream in self._bound:
                    self._datagrams.append(
                        DatagramListener(self._reactor, datagrams, self._on_datagram)
                    )
                    self._listeners.append(
                        Listener(self._reactor, stream, self._on_connection, component=COMPONENT)
                    )
                await trio.sleep_forever()
        finally:
            self._tasks = None
            self.close()

    async def drain(self, seconds: float) -> None:
        """Take no more connections, and wait up to `seconds` for what is under way.

        UDP is served meanwhile: answers must come from the port that was asked. The caller cancels
        `run` afterwards.
        """
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        with trio.move_on_after(seconds):
            while self._under_way or self._connections:
                self._rested = trio.Event()
                await self._rested.wait()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close every socket; needed by hand only if `run` never ran."""
        for datagrams in self._datagrams:
            datagrams.close()
        for listener in self._listeners:
            listener.close()
        for pair in self._bound:
            for sock in pair:
                sock.close()
        self._datagrams.clear()
        self._listeners.clear()
        self._bound.clear()
        self._meant.close()
        self.resolver.upstream.close()

    # UDP.

    def _on_datagram(self, listener: DatagramListener, data: bytes, sender: SocketAddress) -> None:
        outcome = self.resolver.ask(data, Transport.UDP)
        if outcome is None:
            return
        if not isinstance(outcome, Pending):
            listener.send(outcome, sender)
            return
        key = sender, data
        if key in self._under_way:
            return
        if len(self._under_way) >= QUERIES_MAX:
            listener.send(self.resolver.refuse(outcome), sender)
            return
        self._under_way.add(key)
        query = _Datagram(self, listener, sender, data)
        # Now, while the flow is sure to be in the table.
        servers = self._meant.servers_of_datagram(sender, listener.here)
        if outcome.plan is None:
            assert self._tasks is not None
            self._tasks.start_soon(self._ask_when_known, outcome, servers, query)
        else:
            query.forward(outcome, servers)

    async def _ask_when_known(
        self, pending: Pending, servers: Sequence[Endpoint], query: _Datagram
    ) -> None:
        try:
            outcome = await self.resolver.known(pending)
        except Exception as error:  # noqa: BLE001 - a bug ends one query only
            query.fail(error)
        except BaseException:
            query.end()
            raise
        else:
            if isinstance(outcome, Pending):
                query.forward(outcome, servers)
            else:
                query.reply(outcome)

    def ended(self, sender: SocketAddress, data: bytes) -> None:
        """Make room for another query."""
        self._under_way.discard((sender, data))
        self._rest()

    def note_bug(self, error: Exception) -> None:
        """Count and log what nobody foresaw."""
        self._metrics.bugs.count(COMPONENT).add(1)
        log.error("DNS query failed unexpectedly", exc_info=error)

    # TCP.

    def _on_connection(self, sock: Socket, source: Endpoint) -> None:
        if self._connections >= CONNECTIONS_MAX:
            sock.close()
            self.resolver.tally.limit_reached()
            log.debug("too many DNS connections", source=str(source))
            return
        assert self._tasks is not None
        self._connections += 1
        self._tasks.start_soon(self._serve_connection, sock)

    async def _serve_connection(self, sock: Socket) -> None:
        try:
            with sock:
                local = Endpoint.of(sock.getsockname())
                servers = self._meant.servers(original_destination(sock), local)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                await StreamQueries(stream, self.resolver, servers).serve()
        except* Exception as group:  # noqa: BLE001 - a bug ends one connection only
            self.note_bug(group)
        finally:
            self._connections -= 1
            self._rest()

    # Both.

    def _rest(self) -> None:
        if not self._under_way and not self._connections:
            self._rested.set()

    def _open_conntrack(self) -> Conntrack | None:
        netns = self._sockets.netns
        try:
            return Conntrack() if netns is None else netns.call(Conntrack)
        except OSError as error:
            log.warning("original destination of DNS queries is unknown", error=str(error))
            return None

    def _read_resolv_conf(self) -> ResolvConf:
        path = self._settings.resolv_conf
        try:
            return ResolvConf.parse(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            log.warning("no resolver to fall back to", path=str(path), error=str(error))
            return ResolvConf()


class _Datagram:
    """A query by UDP that is under way, and the way back."""

    __slots__ = ("_data", "_forwarded", "_listener", "_sender", "_server")

    def __init__(
        self, server: DnsServer, listener: DatagramListener, sender: SocketAddress, data: bytes
    ) -> None:
        self._server = server
        self._listener = listener
        self._sender = sender
        self._data = data
        self._forwarded: Forwarded | None = None

    def forward(self, pending: Pending, servers: Sequence[Endpoint]) -> None:
        """Ask upstream, and reply when something has come of it."""
        resolver = self._server.resolver
        try:
            self._forwarded = resolver.forwarded(pending)
            resolver.upstream.ask_datagram(pending.data, pending.query, servers, self.ended)
        except Exception as error:  # noqa: BLE001 - a bug ends one query only
            self.fail(error)

    def ended(self, outcome: Outcome) -> None:
        """Reply with what has come of it."""
        assert self._forwarded is not None
        try:
            answer = self._forwarded.ended(outcome)
        except Exception as error:  # noqa: BLE001 - a bug ends one query only
            self.fail(error)
        else:
            self.reply(answer)

    def reply(self, answer: bytes) -> None:
        """Send the answer; that is the end."""
        self.end()
        self._listener.send(answer, self._sender)

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self.end()
        self._server.note_bug(error)

    def end(self) -> None:
        """Make room."""
        self._server.ended(self._sender, self._data)
