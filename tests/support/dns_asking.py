"""Queries to `ztunnel.dns.upstream`, and what comes of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.message
import trio

from tests.support.resolvers import answered
from ztunnel.dns.upstream import Outcome, Upstream
from ztunnel.errors import UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire import dns as wire
from ztunnel.wire.dns import Query

OURS = SocketFactory(netns=None, mark=None, keepalive=None)
MESSAGE = dns.message.make_query("example.org", "A", id=4711).to_wire()
RECORD = "example.org. 60 IN A 192.0.2.1"
ANSWER = answered(MESSAGE, RECORD)


def a_query(message: bytes = MESSAGE) -> Query:
    query = wire.parse_query(message)
    assert isinstance(query, Query)
    return query


@asynccontextmanager
async def an_upstream() -> AsyncIterator[Upstream]:
    reactor = Reactor()
    asking = Upstream(OURS, reactor, random.Random(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        try:
            yield asking
        finally:
            asking.close()
            nursery.cancel_scope.cancel()


def right(data: bytes, number: int) -> list[bytes]:
    return [answered(data, RECORD)]


class Ending:
    """What came of one query by UDP."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._ended = trio.Event()

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._ended.set()

    async def came(self) -> None:
        await self._ended.wait()

    async def answer(self) -> bytes:
        await self._ended.wait()
        (outcome,) = self.outcomes
        if isinstance(outcome, bytes):
            return outcome
        raise outcome


def begin(asking: Upstream, *servers: Endpoint) -> Ending:
    ending = Ending()
    asking.ask_datagram(MESSAGE, a_query(), servers, ending)
    return ending


async def ask(*servers: Endpoint) -> bytes:
    async with an_upstream() as asking:
        ending = begin(asking, *servers)
        await ending.came()
    return await ending.answer()


async def ask_by_tcp(*servers: Endpoint, message: bytes = MESSAGE) -> list[bytes]:
    delivered: list[bytes] = []

    async def deliver(answer: bytes) -> None:
        await trio.lowlevel.checkpoint()
        delivered.append(answer)

    failure: Exception | None = None
    async with an_upstream() as asking:
        try:
            await asking.ask_stream(message, a_query(message), servers, deliver)
        except UnreachableError as error:
            failure = error
        assert asking.queries == 0
    if failure is not None:
        raise failure
    return delivered
