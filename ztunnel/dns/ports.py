"""Where queries go out by UDP: random ports towards one resolver, each for a short while.

How it works: a port is a connected socket, so the kernel drops what comes from anybody but the
resolver, and what may come is told apart by id. Who forges an answer must guess both (RFC 5452
s4.5, s9.2): ids are random, and so is which of the open ports a query leaves by. A pod that asks
seldom has a port per query, like any client; one that asks a lot opens a new one only when
`PORTS_PER_SERVER` are open, none of which lives long. A datagram that nobody waits for may be a
guess, and its port is used for no further query.

Ports must not live long for another reason, too: a resolver behind a service address is chosen once
per port, so a port may lead to a pod that has died.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from ztunnel.transport.datagram import DATAGRAMS_PER_TURN, RECEIVE_BYTES, connect_datagram
from ztunnel.transport.reactor import HUNG_UP, READABLE
from ztunnel.wire import dns

if TYPE_CHECKING:
    import random

    from ztunnel.model.network import Endpoint
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import Socket, SocketFactory

PORTS_PER_SERVER = 16  # one is then opened for 32 queries: 1 us of each instead of 30
PORT_QUERIES_MAX = 32
PORT_SECONDS = 5.0
PORTS_KEPT_MAX = 64  # per pod, of all servers; beyond them each query has a port to itself
_NEWS = READABLE | HUNG_UP


class Waiting(Protocol):
    """A query that has been sent from a port."""

    question: bytes

    def answered(self, data: bytes) -> None:
        """Take the answer, and leave all ports."""

    def refused(self, port: OpenPort, error: OSError) -> None:
        """Learn that nothing will come at this port, and leave it."""

    def forget(self) -> None:
        """Leave all ports, and want nothing more."""


class OpenPort:
    """One socket; its owner opens, retires and closes it."""

    __slots__ = ("_ports", "end_of_life", "is_retired", "queries", "sock", "waiting")

    def __init__(self, ports: Ports, sock: Socket) -> None:
        self._ports = ports
        self.sock = sock
        self.waiting: dict[int, Waiting] = {}
        self.queries = 0  # that left by it, ever
        self.is_retired = False
        self.end_of_life = ports.reactor.deadline(PORT_SECONDS, self.expire)

    def on_event(self, events: int) -> None:
        """Receive answers while anybody waits for one, a bounded number per turn.

        Without that the rest is left unread: the next query's answer makes the kernel call again.
        """
        if not events & _NEWS:
            return
        waiting, receive = self.waiting, self.sock.recv
        for _ in range(DATAGRAMS_PER_TURN):
            if not waiting:
                return
            try:
                data = receive(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._ports.give_up(self, error)
                return
            asked = waiting.get(dns.message_id_of(data)) if len(data) >= dns.HEADER_BYTES else None
            if asked is not None and dns.is_answer(data, dns.message_id_of(data), asked.question):
                asked.answered(data)
            else:
                self._ports.retire(self)
        self._ports.reactor.again(self)

    def leave(self, number: int) -> None:
        """Wait no longer for this id."""
        self.waiting.pop(number, None)
        if self.is_retired and not self.waiting:
            self._ports.close_port(self)

    def expire(self) -> None:
        """Be used for no further query: it is too old, or leads nowhere."""
        self._ports.retire(self)

    def fail(self, error: Exception) -> None:  # noqa: ARG002 - the reactor has logged it
        """Carry on: one answer must not end the wait for others."""
        self._ports.reactor.again(self)


class Kept:
    """How many ports of a pod are kept open for further queries."""

    __slots__ = ("ports",)

    def __init__(self) -> None:
        self.ports = 0


class Ports:
    """All ports towards one server."""

    __slots__ = ("_fresh", "_ids", "_kept", "_open", "_sockets", "queries", "reactor", "server")

    def __init__(
        self, server: Endpoint, *, sockets: SocketFactory, reactor: Reactor, ids: random.Random,
        kept: Kept,
    ) -> None:  # fmt: skip
        """Take ids and the choice of ports from `ids`, which must not be predictable."""
        self.server = server
        self.reactor = reactor
        self.queries = 0  # under way, by UDP and TCP; its owner counts
        self._sockets = sockets
        self._ids = ids
        self._kept = kept
        self._fresh: list[OpenPort] = []
        self._open: set[OpenPort] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost by forgetting it."""
        return not self._open and not self.queries

    def send(self, message: bytes, asked: Waiting) -> tuple[OpenPort, int]:
        """Send a query by some port; return it and the id by which `asked` waits there.

        Raises:
            OSError: it cannot be sent.
        """
        bits = self._ids.getrandbits(32)
        port = self._choose(bits >> 16)
        try:
            return port, self._send(port, bits & 0xFFFF, message, asked)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise
            # Perhaps news about an earlier query, which says nothing about this one.
            self.give_up(port, error)
        port = self._opened()
        try:
            return port, self._send(port, bits & 0xFFFF, message, asked)
        except OSError:
            self.retire(port)
            raise

    def retire(self, port: OpenPort) -> None:
        """Use a port for no further query; it is closed when nobody waits at it."""
        if not port.is_retired:
            port.is_retired = True
            self._fresh.remove(port)
            self._kept.ports -= 1
        if not port.waiting:
            self.close_port(port)

    def give_up(self, port: OpenPort, error: OSError) -> None:
        """Tell all who wait at a port that nothing will come."""
        self.retire(port)
        for asked in tuple(port.waiting.values()):
            asked.refused(port, error)

    def close_port(self, port: OpenPort) -> None:
        """Close one port; more than once is fine."""
        if port in self._open:
            self._open.remove(port)
            port.end_of_life.cancel()
            self.reactor.forget(port.sock)
            port.sock.close()

    def close(self) -> None:
        """Close everything, and send nothing more for those who wait."""
        for port in tuple(self._open):
            for asked in tuple(port.waiting.values()):
                asked.forget()
            self.retire(port)

    def _choose(self, bits: int) -> OpenPort:
        fresh = self._fresh
        if len(fresh) < PORTS_PER_SERVER:
            return self._opened()
        return fresh[bits % len(fresh)]

    def _opened(self) -> OpenPort:
        sock = connect_datagram(self._sockets, self.server)
        port = OpenPort(self, sock)
        self.reactor.register(sock, port)
        self._open.add(port)
        self._fresh.append(port)
        self._kept.ports += 1
        return port

    def _send(self, port: OpenPort, number: int, message: bytes, asked: Waiting) -> int:
        waiting = port.waiting
        while number in waiting:
            number = self._ids.getrandbits(16)
        with suppress(BlockingIOError):  # then it is as if it were lost on the way
            port.sock.send(dns.with_id(message, number))
        waiting[number] = asked
        port.queries += 1
        if port.queries >= PORT_QUERIES_MAX or self._kept.ports > PORTS_KEPT_MAX:
            self.retire(port)
        return number
