"""Answers the queries of one pod, in whatever transport they came (dns-and-observability.md 2).

How it works: what can be said at once is said at once, by `ask`, which never waits. Everything
else becomes a `Pending`, which the transport finishes in a task of its own, so that no query waits
for another. A plan is remembered by the bytes of its query until anything in the store changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.decide import names
from ztunnel.decide.names import Viewpoint
from ztunnel.dns import answers
from ztunnel.dns.answers import Forward, Local, Plan
from ztunnel.errors import LimitError, RouteError, UnreachableError
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import get
from ztunnel.wire import dns
from ztunnel.wire.dns import MESSAGE_BYTES_MAX, Query, Rcode, Reply

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from ztunnel.dns.upstream import Deliver, Upstream
    from ztunnel.model.identity import Namespace
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.model.workload import Workload
    from ztunnel.state.store import Store
    from ztunnel.telemetry.exposition import Family
    from ztunnel.telemetry.metrics import Metrics

log = get("dns")

MEMO_ENTRIES_MAX = 512
MEMO_QUERY_BYTES_MAX = 320  # the longest name with EDNS and a cookie; more is not worth keeping
FORWARDED = "forwarded"
UNKNOWN = "unknown"
LIMIT = "dns_queries_per_pod"
# REFUSED is what a resolver says that serves only other zones.
_UNKNOWN_NAME = frozenset({Rcode.NXDOMAIN, Rcode.REFUSED})


class Transport(StrEnum):
    """How a query came; values are those of the metric label."""

    UDP = "udp"
    TCP = "tcp"


class Client(Protocol):
    """The pod whose queries these are."""

    def workload(self) -> Workload | None:
        """Look up its workload."""

    async def known_workload(self) -> Workload:
        """Look up its workload, waiting a while for the control plane.

        Raises:
            RouteError: it stayed unknown.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """What decides how names look, but for the client's network."""

    namespace: Namespace
    cluster_domain: str
    preferred_namespace: Namespace | None
    ipv6: bool


@dataclass(frozen=True, slots=True)
class Pending:
    """A query that cannot be answered at once; `plan` is None while we do not know who asks."""

    data: bytes
    query: Query
    plan: Forward | None
    transport: Transport


class Resolver:
    """One pod's; shared by its UDP and TCP sockets."""

    def __init__(
        self, *, client: Client, naming: Naming, store: Store, metrics: Metrics,
        upstream: Upstream, rng: random.Random,
    ) -> None:  # fmt: skip
        self.upstream = upstream
        self._client = client
        self._naming = naming
        self._store = store
        self._metrics = metrics
        self._rng = rng
        self._memo: dict[bytes, tuple[Query, Plan]] = {}
        self._version = -1

    def ask(self, data: bytes, transport: Transport) -> bytes | Pending | None:
        """Answer at once if possible; None if the message deserves no answer."""
        if self._version != self._store.version:
            self._memo.clear()
            self._version = self._store.version
        known = self._memo.get(data[2:])
        if known is None:
            query = dns.parse_query(data)
            if not isinstance(query, Query):
                return query.reply if query is not None else None
            workload = self._client.workload()
            if workload is None:
                return Pending(data, query, None, transport)
            known = query, answers.plan(query, self._view(workload), self._store)
            self._remember(data, known)
        query, plan = known
        self._count(self._metrics.dns_requests, query, transport)
        if isinstance(plan, Forward):
            return Pending(data, query, plan, transport)
        return self._say(data, query, plan, transport)

    async def finish(
        self,
        pending: Pending,
        servers: Sequence[Endpoint],
        deliver: Deliver,
    ) -> None:
        """Deliver the answer to a pending query, from one of `servers` if it is not ours."""
        query, plan = pending.query, pending.plan
        if plan is None:
            decided = await self._late_plan(query)
            self._count(self._metrics.dns_requests, query, pending.transport)
            if decided is None:
                await deliver(self._fail(pending, "the local workload is unknown"))
                return
            if isinstance(decided, Local):
                await deliver(self._say(pending.data, query, decided, pending.transport))
                return
            plan = decided
        await self._forward(pending, plan, servers, deliver)

    def refuse(self, pending: Pending) -> bytes:
        """Answer a query for which we have no place."""
        self._metrics.limits_reached.count(LIMIT).add(1)
        return self._fail(pending, "too many queries under way")

    def local_addresses(self, hostname: str) -> list[IpAddress] | None:
        """List what a name of the mesh stands for, in random order; None if it is not the mesh's.

        For those who have a host name but no query, as SOCKS5 has.
        """
        workload = self._client.workload()
        if workload is None:
            return None
        view, services = self._view(workload), self._store.services
        found = names.find(hostname.lower().removesuffix("."), view, services)
        if found is None:
            return None
        listed = [
            ip for version in (4, 6) for ip in names.addresses(found, version, view, services)
        ]
        self._rng.shuffle(listed)
        return listed

    def _view(self, workload: Workload) -> Viewpoint:
        naming = self._naming
        return Viewpoint(
            namespace=naming.namespace,
            network=workload.network,
            cluster_domain=naming.cluster_domain,
            preferred_namespace=naming.preferred_namespace,
            ipv6=naming.ipv6,
        )

    def _remember(self, data: bytes, known: tuple[Query, Plan]) -> None:
        if len(data) > MEMO_QUERY_BYTES_MAX:
            return
        if len(self._memo) >= MEMO_ENTRIES_MAX:
            # The oldest goes: whoever asks for ever new names does not empty it for all others.
            del self._memo[next(iter(self._memo))]
        self._memo[data[2:]] = known

    async def _late_plan(self, query: Query) -> Plan | None:
        try:
            workload = await self._client.known_workload()
        except RouteError:
            return None
        return answers.plan(query, self._view(workload), self._store)

    def _say(self, data: bytes, query: Query, plan: Local, transport: Transport) -> bytes:
        self._note(query, plan.result, plan.endpoints)
        return self._rendered(data, query, answers.shuffled(plan.reply, self._rng), transport)

    def _rendered(self, data: bytes, query: Query, reply: Reply, transport: Transport) -> bytes:
        limit = query.udp_limit if transport is Transport.UDP else MESSAGE_BYTES_MAX
        return dns.render(query, reply, limit=limit, message_id=dns.message_id_of(data))

    def _fail(self, pending: Pending, reason: str) -> bytes:
        self._note(pending.query, reason)
        return dns.error(pending.query, Rcode.SERVFAIL, dns.message_id_of(pending.data))

    async def _forward(
        self,
        pending: Pending,
        plan: Forward,
        servers: Sequence[Endpoint],
        deliver: Deliver,
    ) -> None:
        query, transport, metrics = pending.query, pending.transport, self._metrics
        otherwise = None
        if plan.otherwise is not None:
            otherwise = self._rendered(pending.data, query, plan.otherwise, transport)
        asked = _Asked(otherwise, deliver)
        self._count(metrics.dns_upstream_requests, query, transport)
        started = trio.current_time()
        failure = ""
        try:
            if transport is Transport.UDP:
                await asked.take(await self.upstream.ask_datagram(pending.data, query, servers))
            else:
                await self.upstream.ask_stream(pending.data, query, servers, asked.take)
        except (UnreachableError, LimitError) as error:
            failure = f"forwarding failed: {error}"
            if isinstance(error, LimitError):
                metrics.limits_reached.count(LIMIT).add(1)
        seconds = trio.current_time() - started
        metrics.dns_upstream_seconds.histogram(*self._labels(query, transport)).observe(seconds)
        if failure or asked.is_empty:
            # As the reference counts: "no such name" and "no such record" are in it.
            self._count(metrics.dns_upstream_failures, query, transport)
        if failure:
            await deliver(self._fail(pending, failure))
        else:
            self._note(query, FORWARDED)

    def _labels(self, query: Query, transport: Transport) -> tuple[str, str, str, str]:
        workload = self._client.workload()
        if workload is None:
            return query.type_name, transport, UNKNOWN, UNKNOWN
        service = workload.canonical_name or UNKNOWN
        return query.type_name, transport, service, workload.canonical_revision or UNKNOWN

    def _count(self, family: Family, query: Query, transport: Transport) -> None:
        family.count(*self._labels(query, transport)).add(1)

    def _note(self, query: Query, result: str, endpoints: int = 0) -> None:
        if not log.is_enabled(Level.DEBUG):
            return
        workload = self._client.workload()
        fields: dict[str, object] = {
            "src.workload": workload.name if workload else None,
            "src.namespace": self._naming.namespace,
            "query": query.type_name,
            "domain": query.name,
            "result": result,
            "endpoints": endpoints,
        }
        log.debug("", **fields)


class _Asked:
    """Passes on what upstream says, corrected where we know better."""

    __slots__ = ("_deliver", "_otherwise", "is_empty")

    def __init__(self, otherwise: bytes | None, deliver: Deliver) -> None:
        self.is_empty = True  # until there was a record
        self._otherwise = otherwise
        self._deliver = deliver

    async def take(self, answer: bytes) -> None:
        """Deliver one answer."""
        rcode = dns.rcode_of(answer)
        if rcode == Rcode.NOERROR and dns.answer_count(answer):
            self.is_empty = False
        if self._otherwise is not None and rcode in _UNKNOWN_NAME:
            answer = self._otherwise
        await self._deliver(answer)
