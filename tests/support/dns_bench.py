"""A resolver of ours with everything around it but sockets towards the pod."""

from __future__ import annotations

import random
from typing import Any

import dns.message
import trio

from tests.support.builders import a_service, a_store
from tests.support.dns import FakeClient
from ztunnel.dns.resolver import Naming, Pending, Resolver, Transport
from ztunnel.dns.upstream import Outcome, Upstream
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Endpoint
from ztunnel.model.service import Service
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory

CART = a_service(vips=["10.0.0.1", "2001:db8::1"])
UDP, TCP = Transport.UDP, Transport.TCP
LABELS = ("a", "udp", "web", "v1")


class Bench:
    """A resolver with everything around it."""

    def __init__(self, *services: Service, client: FakeClient | None = None) -> None:
        self.store: Store = a_store(*(services or (CART,)))
        self.client = client or FakeClient.web()
        self.metrics = Metrics()
        self.upstream = Upstream(
            SocketFactory(netns=None, mark=None, keepalive=None), Reactor(), random.Random(1)
        )
        self.resolver = Resolver(
            client=self.client,
            naming=Naming(
                namespace=Namespace("shop"),
                cluster_domain="cluster.local",
                preferred_namespace=None,
                ipv6=True,
            ),
            store=self.store,
            metrics=self.metrics,
            upstream=self.upstream,
            rng=random.Random(1),
        )  # fmt: skip

    def count(self, family: str, *labels: str) -> float:
        return float(getattr(self.metrics, family).count(*(labels or LABELS)).value)

    def answer(self, data: bytes, transport: Transport = UDP) -> dns.message.Message:
        outcome = self.resolver.ask(data, transport)
        assert isinstance(outcome, bytes)
        return dns.message.from_wire(outcome)

    async def finish(self, data: bytes, *servers: Endpoint, by: Transport = UDP) -> list[bytes]:
        outcome = self.resolver.ask(data, by)
        assert isinstance(outcome, Pending)
        if by is TCP or outcome.plan is None:
            return await self.finish_stream(outcome, *servers)
        forwarded = self.resolver.forwarded(outcome)
        outcomes: list[bytes] = []
        ended = trio.Event()

        def end(result: Outcome) -> None:
            outcomes.append(forwarded.ended(result))
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.upstream.reactor.run)
            self.upstream.ask_datagram(data, outcome.query, servers, end)
            await ended.wait()
            nursery.cancel_scope.cancel()
        self.upstream.close()
        self.upstream.reactor = Reactor()
        return outcomes

    async def finish_stream(self, pending: Pending, *servers: Endpoint) -> list[bytes]:
        delivered: list[bytes] = []

        async def deliver(answer: bytes) -> None:
            await trio.lowlevel.checkpoint()
            delivered.append(answer)

        await self.resolver.finish_stream(pending, servers, deliver)
        return delivered


def a_query(name: str = "cart.shop", rtype: str = "A", number: int = 4711, **more: Any) -> bytes:
    return dns.message.make_query(name, rtype, id=number, **more).to_wire()
