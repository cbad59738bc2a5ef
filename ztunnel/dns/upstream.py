"""Ask the resolver that the pod asked (dns-and-observability.md 2.8 and 11.2, 11.3).

How it works: a query goes on as it came, in the transport in which it came, with an id of its own
and from a port of its own, and its answer goes back as it came. So EDNS, DNSSEC, truncation and
whatever else two ends agree on work as without us, and a truncated answer makes the client ask by
TCP, which we carry on by TCP. There is no cache: the resolver has one.

An answer must come from the server's address to our port with our id and our question; anything
else is ignored (RFC 5452 s9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import LimitError, UnreachableError
from ztunnel.model.network import Endpoint, Port, parse_ip
from ztunnel.transport.datagram import RECEIVE_BYTES, connect_datagram, dial_resolver
from ztunnel.wire import dns
from ztunnel.wire.dns import MessageSplitter, Query, RecordType

if TYPE_CHECKING:
    import random

    from ztunnel.transport.sockets import Socket, SocketFactory

DNS_PORT = Port(53)
# A lost datagram is sent again after two seconds. Together they end before the five seconds after
# which glibc would ask again itself, so that it hears of the failure and tries its next server.
WAITS_SECONDS = (2.0, 2.5)
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0  # by TCP, and between two messages of a zone transfer
QUERIES_MAX = 512  # under way at once, per pod
QUERIES_PER_SERVER_MAX = 256  # so that a dead resolver leaves room for the others
CHUNK_BYTES = 16384
_TRANSFERS = frozenset({RecordType.AXFR, RecordType.IXFR})
Deliver = Callable[[bytes], Awaitable[None]]
"""What to do with an answer."""

NO_SERVER = "no resolver is known"


class Upstream:
    """Carries queries of one pod on; bounded in number, in all and per server."""

    def __init__(self, sockets: SocketFactory, ids: random.Random) -> None:
        """Take message ids from `ids`, which must not be predictable."""
        self._sockets = sockets
        self._ids = ids
        self._by_server: Counter[Endpoint] = Counter()
        self.queries = 0  # under way

    async def ask_datagram(
        self, message: bytes, query: Query, servers: Sequence[Endpoint]
    ) -> bytes:
        """Ask by UDP: one server twice, or else the first two in turn.

        Raises:
            UnreachableError: nobody answered.
            LimitError: too many queries are under way.
        """
        error = UnreachableError(NO_SERVER)
        turns = [(servers[0], WAITS_SECONDS)] if len(servers) == 1 else [
            (server, (seconds,)) for server, seconds in zip(servers, WAITS_SECONDS, strict=False)
        ]  # fmt: skip
        for server, waits in turns:
            try:
                return await self._ask_datagram(message, query, server, waits)
            except UnreachableError as failure:
                error = failure
        raise error

    async def ask_stream(
        self,
        message: bytes,
        query: Query,
        servers: Sequence[Endpoint],
        deliver: Deliver,
    ) -> None:
        """Ask the first server by TCP; a zone transfer delivers several answers.

        Raises:
            UnreachableError: it did not answer.
            LimitError: too many queries are under way.
        """
        if not servers:
            raise UnreachableError(NO_SERVER)
        server, number = servers[0], self._ids.getrandbits(16)

        async def back(answer: bytes) -> None:
            await deliver(dns.with_id(answer, dns.message_id_of(message)))

        with self._place(server):
            stream = await self._connected(server)
            async with stream:
                try:
                    with trio.fail_after(ANSWER_SECONDS):
                        await stream.send_all(dns.framed(dns.with_id(message, number)))
                    if not await _deliver(stream, number, query, back):
                        raise UnreachableError(f"{server}: closed without an answer")
                except trio.BrokenResourceError as error:
                    raise UnreachableError(f"{server}: {error.__cause__ or error}") from error
                except trio.TooSlowError:
                    raise UnreachableError(f"{server}: timed out") from None

    async def _ask_datagram(
        self, message: bytes, query: Query, server: Endpoint, waits: Sequence[float]
    ) -> bytes:
        number = self._ids.getrandbits(16)
        wire = dns.with_id(message, number)
        with self._place(server):
            try:
                with connect_datagram(self._sockets, server) as sock:
                    for seconds in waits:
                        sock.send(wire)
                        with trio.move_on_after(seconds):
                            answer = await _received(sock, number, query.question)
                            return dns.with_id(answer, dns.message_id_of(message))
            except OSError as error:
                raise UnreachableError(f"{server}: {error.strerror or error}") from error
        raise UnreachableError(f"{server}: timed out")

    async def _connected(self, server: Endpoint) -> trio.SocketStream:
        try:
            sock = dial_resolver(self._sockets, server)
        except OSError as error:
            raise UnreachableError(f"{server}: {error.strerror or error}") from error
        raw = trio.socket.from_stdlib_socket(sock)
        try:
            with trio.fail_after(CONNECT_SECONDS):
                # Begun already: this waits for its end.
                await raw.connect((str(server.ip), server.port))
        except OSError as error:
            raw.close()
            raise UnreachableError(f"{server}: {error.strerror or error}") from error
        except trio.TooSlowError:
            raw.close()
            raise UnreachableError(f"{server}: connection timed out") from None
        except BaseException:
            raw.close()
            raise
        return trio.SocketStream(raw)

    @contextmanager
    def _place(self, server: Endpoint) -> Iterator[None]:
        """Take a place among the queries under way.

        Raises:
            LimitError: there is none.
        """
        by_server = self._by_server
        if self.queries >= QUERIES_MAX or by_server[server] >= QUERIES_PER_SERVER_MAX:
            raise LimitError(f"{server}: too many queries under way")
        by_server[server] += 1
        self.queries += 1
        try:
            yield
        finally:
            self.queries -= 1
            by_server[server] -= 1
            if not by_server[server]:
                del by_server[server]


async def _deliver(stream: trio.SocketStream, number: int, query: Query, deliver: Deliver) -> bool:
    """Deliver what the server answers; return whether there was anything.

    Raises:
        trio.TooSlowError: the first answer did not come in time.
    """
    splitter = MessageSplitter()
    delivered = False
    while True:
        with trio.move_on_after(ANSWER_SECONDS) as scope:
            chunk = await stream.receive_some(CHUNK_BYTES)
        if scope.cancelled_caught or not chunk:
            break
        for answer in splitter.feed(bytes(chunk)):
            # Only the first message of a transfer repeats the question (RFC 5936 s2.2.1).
            continues = delivered and dns.message_id_of(answer) == number
            if continues or dns.is_answer(answer, number, query.question):
                delivered = True
                await deliver(answer)
                if query.rtype not in _TRANSFERS:
                    return True
    if scope.cancelled_caught and not delivered:
        raise trio.TooSlowError
    return delivered


async def _received(sock: Socket, number: int, question: bytes) -> bytes:
    """Wait for the answer, and for nothing else."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            continue  # its checksum was wrong
        if dns.is_answer(data, number, question):
            return data


def servers_of(resolv_conf: str) -> tuple[Endpoint, ...]:
    """Read the `nameserver` lines of a resolv.conf(5)."""
    found = []
    for line in resolv_conf.splitlines():
        keyword, *words = line.split() or [""]
        if keyword == "nameserver" and words:
            # A wrong line is ignored, as resolvers do.
            with suppress(ValueError):
                found.append(Endpoint(parse_ip(words[0]), DNS_PORT))
    return tuple(found)
