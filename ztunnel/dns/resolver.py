"""Answers the queries of one pod, in whatever transport they came (dns-and-observability.md 2).

How it works: what can be said at once is said at once, by `ask`, which never waits. Everything
else becomes a `Pending`, which the transport finishes: by UDP the answer calls back, by TCP it has
a task of its own, so no query waits for another. A plan is remembered until anything in the store
changes: by the bytes of its query, which costs nothing to look up, and by its question, for those
who put something new (such as a cookie) into each query.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from ztunnel.decide import names
from ztunnel.decide.names import Viewpoint
from ztunnel.dns import answers
from ztunnel.dns.answers import Forward, Local, Plan
from ztunnel.dns.tally import Source, Tally
from ztunnel.errors import LimitError, RouteError, UnreachableError
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import get
from ztunnel.wire import dns
from ztunnel.wire.dns import MESSAGE_BYTES_MAX, Query, Rcode, Reply

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from ztunnel.dns.upstream import Deliver, Outcome, Upstream
    from ztunnel.model.identity import Namespace
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.model.workload import Workload
    from ztunnel.state.store import Store
    from ztunnel.telemetry.metrics import Metrics

log = get("dns")

K = TypeVar("K")
V = TypeVar("V")

MEMO_ENTRIES_MAX = 512
MEMO_QUERY_BYTES_MAX = 320  # the longest name with EDNS and a cookie; more is not worth keeping
FORWARDED = "forwarded"
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
    search: tuple[str, ...] | None = None  # None: we cannot know the pod's


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
        self.stream_queries = 0  # by TCP that have no answer yet; their connections count
        self._client = client
        self._naming = naming
        self._store = store
        self.tally = Tally(metrics, client)
        self._rng = rng
        self._memo: dict[bytes, tuple[Query, Plan]] = {}
        self._plans: dict[tuple[bytes, int], Plan] = {}
        self._version = -1

    def ask(self, data: bytes, transport: Transport) -> bytes | Pending | None:
        """Answer at once if possible; None if the message deserves no answer."""
        if self._version != self._store.version:
            self._memo.clear()
            self._plans.clear()
            self._version = self._store.version
        known = self._memo.get(data[2:])
        if known is None:
            query = dns.parse_query(data)
            if not isinstance(query, Query):
                if query is None:
                    return None
                self.tally.answered(Source.PROXY, query.rcode)
                return query.reply
            workload = self._client.workload()
            if workload is None:
                return Pending(data, query, None, transport)
            known = query, self._plan(query, workload)
            if len(data) <= MEMO_QUERY_BYTES_MAX:
                _remember(self._memo, data[2:], known)
        query, plan = known
        self.tally.of(query, transport).requests.add(1)
        if isinstance(plan, Forward):
            return Pending(data, query, plan, transport)
        return self._say(data, query, plan, transport)

    async def known(self, pending: Pending) -> bytes | Pending:
        """Wait until we know who asks: then it is answered, or has a plan."""
        workload = None
        with contextlib.suppress(RouteError):
            workload = await self._client.known_workload()
        self.tally.of(pending.query, pending.transport).requests.add(1)
        if workload is None:
            return self.fail(pending, "the local workload is unknown")
        plan = answers.plan(pending.query, self._view(workload), self._store)
        if isinstance(plan, Local):
            return self._say(pending.data, pending.query, plan, pending.transport)
        return Pending(pending.data, pending.query, plan, pending.transport)

    def forwarded(self, pending: Pending) -> Forwarded:
        """Begin to ask upstream; how is the transport's choice. The query has a plan."""
        assert pending.plan is not None
        otherwise = None
        if pending.plan.otherwise is not None:
            otherwise = self._rendered(
                pending.data, pending.query, pending.plan.otherwise, pending.transport
            )
        return Forwarded(self, pending, otherwise)

    async def finish_stream(
        self, pending: Pending, servers: Sequence[Endpoint], deliver: Deliver
    ) -> None:
        """Deliver the answers to a pending query, by TCP if they are not ours."""
        if pending.plan is None:
            outcome = await self.known(pending)
            if not isinstance(outcome, Pending):
                await deliver(outcome)
                return
            pending = outcome
        forwarded = self.forwarded(pending)

        async def take(answer: bytes) -> None:
            await deliver(forwarded.corrected(answer))

        try:
            await self.upstream.ask_stream(pending.data, pending.query, servers, take)
        except (UnreachableError, LimitError) as error:
            await deliver(forwarded.failed(error))
        else:
            forwarded.succeeded()

    def refuse(self, pending: Pending) -> bytes:
        """Answer a query for which we have no place."""
        self.tally.limit_reached()
        return self.fail(pending, "too many queries under way")

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
            search=naming.search,
        )

    def _plan(self, query: Query, workload: Workload) -> Plan:
        """Decide, or remember having decided: of a query only this much matters to it."""
        key = query.question, 0 if query.opt is None else query.opt.version
        plan = self._plans.get(key)
        if plan is None:
            plan = answers.plan(query, self._view(workload), self._store)
            _remember(self._plans, key, plan)
        return plan

    def _say(self, data: bytes, query: Query, plan: Local, transport: Transport) -> bytes:
        self.note(query, plan.result, plan.endpoints)
        self.tally.answered(Source.MESH, plan.reply.rcode)
        reply = answers.shuffled(plan.reply, self._rng, _room(query, transport))
        return self._rendered(data, query, reply, transport)

    def _rendered(self, data: bytes, query: Query, reply: Reply, transport: Transport) -> bytes:
        limit = _room(query, transport)
        return dns.render(query, reply, limit=limit, message_id=dns.message_id_of(data))

    def fail(self, pending: Pending, reason: str) -> bytes:
        """Answer SERVFAIL, for a reason that only the log tells."""
        self.note(pending.query, reason)
        self.tally.answered(Source.PROXY, Rcode.SERVFAIL)
        return dns.error(pending.query, Rcode.SERVFAIL, dns.message_id_of(pending.data))

    def note(self, query: Query, result: str, endpoints: int = 0) -> None:
        """Write the line for debugging (8.5)."""
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


def _room(query: Query, transport: Transport) -> int:
    return query.udp_limit if transport is Transport.UDP else MESSAGE_BYTES_MAX


def _remember(memo: dict[K, V], key: K, value: V) -> None:
    if len(memo) >= MEMO_ENTRIES_MAX:
        # The oldest goes: whoever asks for ever new names does not empty it for all others.
        del memo[next(iter(memo))]
    memo[key] = value


class Forwarded:
    """One query that is asked upstream; corrects the answer where we know better, and counts."""

    __slots__ = ("_is_empty", "_otherwise", "_pending", "_resolver", "_series", "_started")

    def __init__(self, resolver: Resolver, pending: Pending, otherwise: bytes | None) -> None:
        self._resolver = resolver
        self._pending = pending
        self._otherwise = otherwise
        self._series = resolver.tally.of(pending.query, pending.transport)
        self._series.upstream_requests.add(1)
        self._started = trio.current_time()
        self._is_empty = True  # until there was a record

    def ended(self, outcome: Outcome) -> bytes:
        """Say what to reply when all is over."""
        if not isinstance(outcome, bytes):
            return self.failed(outcome)
        answer = self.corrected(outcome)
        self.succeeded()
        return answer

    def corrected(self, answer: bytes) -> bytes:
        """Say what to reply; may be called several times, before `succeeded`."""
        code, source = dns.rcode_of(answer), Source.UPSTREAM
        if code == Rcode.NOERROR and dns.answer_count(answer):
            self._is_empty = False
        if self._otherwise is not None and code in _UNKNOWN_NAME:
            answer, code, source = self._otherwise, Rcode.NOERROR, Source.MESH
        self._resolver.tally.answered(source, code)
        return answer

    def succeeded(self) -> None:
        """Count that there was an answer, though perhaps an empty one."""
        self._measure()
        if self._is_empty:
            # As the reference counts: "no such name" and "no such record" are failures, too.
            self._series.upstream_failures.add(1)
        self._resolver.note(self._pending.query, FORWARDED)

    def failed(self, error: UnreachableError | LimitError) -> bytes:
        """Say what to reply when there was none."""
        self._measure()
        self._series.upstream_failures.add(1)
        if isinstance(error, LimitError):
            self._resolver.tally.limit_reached()
        return self._resolver.fail(self._pending, f"forwarding failed: {error}")

    def _measure(self) -> None:
        self._series.upstream_seconds.observe(trio.current_time() - self._started)
