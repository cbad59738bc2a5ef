"""Ask the resolver that the pod asked (dns-and-observability.md 2.8 and 11.2, 11.3).

How it works: a query goes on as it came, in the transport in which it came, and its answer goes
back as it came; by UDP it has an id of ours on the way. So EDNS, DNSSEC, signatures, truncation and
whatever else two ends agree on work as without us, and a truncated answer makes the client ask by
TCP, which we carry on by TCP. There is no cache: the resolver has one.

An answer must come from the server's address to our port with our id and our question; anything
else is ignored (RFC 5452 s9). By UDP no query costs a task: its answer, or a deadline, calls back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from ztunnel.dns.ports import Kept, OpenPort, Ports
from ztunnel.errors import LimitError, UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.transport.datagram import dial_resolver
from ztunnel.wire import dns
from ztunnel.wire.dns import MessageSplitter, Query, RecordType

if TYPE_CHECKING:
    import random

    from ztunnel.transport.deadlines import Deadline
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import SocketFactory

# A lost datagram is sent again after two seconds. Together they end before the five seconds after
# which glibc would ask again itself, so that it hears of the failure and tries its next server;
# the reactor may be a quarter of a second late, twice.
WAITS_SECONDS = (2.0, 2.25)
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0  # by TCP, and between two messages of a zone transfer
QUERIES_MAX = 512  # under way at once, per pod
QUERIES_PER_SERVER_MAX = 256  # so that a dead resolver leaves room for the others
CHUNK_BYTES = 16384
_TRANSFERS = frozenset({RecordType.AXFR, RecordType.IXFR})
Deliver = Callable[[bytes], Awaitable[None]]
"""What to do with an answer that came by TCP."""

Outcome = bytes | UnreachableError | LimitError
"""What came of a query by UDP."""

NO_SERVER = "no resolver is known"


class Upstream:
    """Carries queries of one pod on; bounded in number, in all and per server."""

    def __init__(self, sockets: SocketFactory, reactor: Reactor, ids: random.Random) -> None:
        """Take message ids from `ids`, which must not be predictable."""
        self.reactor = reactor
        self._sockets = sockets
        self._ids = ids
        self._kept = Kept()
        self._servers: dict[Endpoint, Ports] = {}
        self.queries = 0  # under way

    @property
    def ports_kept(self) -> int:
        """How many UDP ports are open that further queries may leave by."""
        return self._kept.ports

    def close(self) -> None:
        """Close the sockets of all queries by UDP, and call nobody back."""
        for ports in tuple(self._servers.values()):
            ports.close()
        self._servers.clear()

    def ask_datagram(
        self,
        message: bytes,
        query: Query,
        servers: Sequence[Endpoint],
        ended: Callable[[Outcome], None],
    ) -> None:
        """Ask by UDP: one server twice, or else the first two in turn; then call `ended`, once.

        That may be before this returns, if it cannot be sent at all.
        """
        _Asked(self, message, query.question, servers, ended).next_turn()

    async def ask_stream(
        self,
        message: bytes,
        query: Query,
        servers: Sequence[Endpoint],
        deliver: Deliver,
    ) -> None:
        """Ask the first server by TCP; a zone transfer delivers several answers.

        The id stays: each query has a connection of its own, into which nobody else can write, and
        of the messages of a signed transfer not all need to say which id they were signed with.

        Raises:
            UnreachableError: it did not answer.
            LimitError: too many queries are under way.
        """
        if not servers:
            raise UnreachableError(NO_SERVER)
        server = servers[0]
        with self._place(server):
            stream = await self._connected(server)
            async with stream:
                try:
                    with trio.fail_after(ANSWER_SECONDS):
                        await stream.send_all(dns.framed(message))
                    if not await _deliver(stream, dns.message_id_of(message), query, deliver):
                        raise UnreachableError(f"{server}: closed without an answer")
                except trio.BrokenResourceError as error:
                    raise UnreachableError(f"{server}: {error.__cause__ or error}") from error
                except trio.TooSlowError:
                    raise UnreachableError(f"{server}: timed out") from None

    def take_place(self, server: Endpoint) -> Ports:
        """Take a place among the queries under way.

        Raises:
            LimitError: there is none.
        """
        ports = self._servers.get(server)
        is_full = ports is not None and ports.queries >= QUERIES_PER_SERVER_MAX
        if is_full or self.queries >= QUERIES_MAX:
            raise LimitError(f"{server}: too many queries under way")
        if ports is None:
            self._forget_idle()
            ports = self._servers[server] = Ports(
                server, sockets=self._sockets, reactor=self.reactor, ids=self._ids, kept=self._kept
            )
        ports.queries += 1
        self.queries += 1
        return ports

    def give_back(self, ports: Ports) -> None:
        """Give a place back."""
        ports.queries -= 1
        self.queries -= 1

    def _forget_idle(self) -> None:
        """Drop servers nobody asks any more: a new one is seldom, so all are looked at then."""
        for server in [server for server, ports in self._servers.items() if ports.is_idle]:
            del self._servers[server]

    async def _connected(self, server: Endpoint) -> trio.SocketStream:
        try:
            sock = dial_resolver(self._sockets, server)
        except OSError as error:
            raise _unreachable(server, error) from error
        raw = trio.socket.from_stdlib_socket(sock)
        try:
            with trio.fail_after(CONNECT_SECONDS):
                # Begun already: this waits for its end.
                await raw.connect((str(server.ip), server.port))
        except OSError as error:
            raw.close()
            raise _unreachable(server, error) from error
        except trio.TooSlowError:
            raw.close()
            raise UnreachableError(f"{server}: connection timed out") from None
        except BaseException:
            raw.close()
            raise
        return trio.SocketStream(raw)

    @contextmanager
    def _place(self, server: Endpoint) -> Iterator[None]:
        ports = self.take_place(server)
        try:
            yield
        finally:
            self.give_back(ports)


class _Asked:
    """One query by UDP, from its first turn to its end.

    Each turn leaves by another port, and what comes at the former is welcome still: a slow resolver
    answers there, and if a port has led to a dead one behind a service address, the next may not.
    """

    __slots__ = (
        "_deadline", "_ended", "_failure", "_message", "_places", "_tries", "_turns", "_upstream",
        "question",
    )  # fmt: skip

    def __init__(
        self, upstream: Upstream, message: bytes, question: bytes, servers: Sequence[Endpoint],
        ended: Callable[[Outcome], None],
    ) -> None:  # fmt: skip
        self.question = question
        self._upstream = upstream
        self._message = message
        self._ended = ended
        turns = servers if len(servers) != 1 else (servers[0], servers[0])
        self._turns = list(zip(turns, WAITS_SECONDS, strict=False))
        self._tries: list[tuple[OpenPort, int]] = []
        self._places: list[Ports] = []
        self._deadline: Deadline | None = None
        self._failure: UnreachableError | LimitError | None = None

    def next_turn(self) -> None:
        """Ask the next server; if there is none left, that is the end."""
        while self._turns:
            server, seconds = self._turns.pop(0)
            try:
                self._send(server)
            except (UnreachableError, LimitError) as error:
                self._fail(server, error)
                continue
            self._deadline = self._upstream.reactor.deadline(seconds, self._time_out)
            return
        self._end(self._failure or UnreachableError(NO_SERVER))

    def answered(self, data: bytes) -> None:
        """End with an answer, which gets the id that the client gave."""
        self._end(dns.with_id(data, dns.message_id_of(self._message)))

    def refused(self, port: OpenPort, error: OSError) -> None:
        """Leave a port; go on at once if this was where we waited."""
        is_current = self._tries[-1][0] is port
        for tried, number in self._tries:
            if tried is port:
                port.leave(number)
        self._tries = [one for one in self._tries if one[0] is not port]
        if is_current:
            server = self._places[-1].server
            self._fail(server, _unreachable(server, error))
            self._stop_waiting()
            self.next_turn()

    def _send(self, server: Endpoint) -> None:
        """Send it by some port of a server, taking a place if this is the first time.

        Raises:
            UnreachableError: it cannot be sent.
            LimitError: too many queries are under way.
        """
        if not self._places or self._places[-1].server != server:
            self._places.append(self._upstream.take_place(server))
        try:
            self._tries.append(self._places[-1].send(self._message, self))
        except OSError as error:
            raise _unreachable(server, error) from error

    def _time_out(self) -> None:
        server = self._places[-1].server
        self._failure = UnreachableError(f"{server}: timed out")
        # No more queries from where an answer is overdue, and not this one again.
        for port, _ in self._tries:
            port.expire()
        self.next_turn()

    def _fail(self, server: Endpoint, error: UnreachableError | LimitError) -> None:
        """Ask this server no more."""
        self._failure = error
        self._turns = [turn for turn in self._turns if turn[0] != server]

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def forget(self) -> None:
        """End without telling anybody."""
        self._stop_waiting()
        for port, number in self._tries:
            port.leave(number)
        for place in self._places:
            self._upstream.give_back(place)
        self._tries.clear()
        self._places.clear()

    def _end(self, outcome: Outcome) -> None:
        self.forget()
        self._ended(outcome)


def _unreachable(server: Endpoint, error: OSError) -> UnreachableError:
    return UnreachableError(f"{server}: {error.strerror or error}")


async def _deliver(stream: trio.SocketStream, number: int, query: Query, deliver: Deliver) -> bool:
    """Deliver what the server answers; return whether there was anything.

    What is no answer buys it no time.

    Raises:
        trio.TooSlowError: the first answer did not come in time.
    """
    splitter = MessageSplitter()
    delivered = False
    deadline = trio.current_time() + ANSWER_SECONDS
    while True:
        with trio.move_on_at(deadline) as scope:
            chunk = await stream.receive_some(CHUNK_BYTES)
        if scope.cancelled_caught or not chunk:
            break
        for answer in splitter.feed(bytes(chunk)):
            goes_on = delivered and dns.is_continuation(answer, number)  # RFC 5936 s2.2.1
            if goes_on or dns.is_answer(answer, number, query.question):
                delivered = True
                await deliver(answer)
                if query.rtype not in _TRANSFERS:
                    return True
                deadline = trio.current_time() + ANSWER_SECONDS
    if scope.cancelled_caught and not delivered:
        raise trio.TooSlowError
    return delivered
