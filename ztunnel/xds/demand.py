"""Addresses fetched when they are needed: on-demand mode (state-and-xds.md 13).

How it works: whoever lacks an address waits here, all who lack the same one share a request. An
answer may name the address itself, another name of it, or say that there is none; it may also hold
what was asked for under a name we could not foresee (a range of addresses), so the store is looked
at as well. An address that does not exist is remembered for a while. A name without an answer is
given up when nobody waits for it any more, so that the server does not watch it for ever.

How a connection uses it:

    fetched: set[str] = set()
    while isinstance(answer := route(..., on_demand=True, fetched=fetched), UnknownAddress):
        await demand.fetch(answer.what)
        fetched.add(answer.what)

The reference's mode does not work (16.9 to 16.11): it wakes nobody who asked by address, drops the
first of two waiters, and has no time limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import trio

from ztunnel.errors import LimitError, RouteError
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.workload import NamespacedHostname, WorkloadUid
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics

WAIT_SECONDS = 5.0
ABSENT_SECONDS = 10.0  # how long "there is none" is believed without asking again
ABSENT_MAX = 10_000
# A pod that scans addresses must not fill the control plane or us with questions.
NAMES_MAX = 1_000
LIMIT = "on_demand_names"


class Answer(Enum):
    """What became of a question."""

    KNOWN = "known"  # the store has it now
    ABSENT = "absent"  # the control plane says there is none


class Questions(Protocol):
    """A stream to the control plane on which names can be asked for."""

    def ask(self, names: Collection[str]) -> None:
        """Ask for these names."""

    def forget(self, names: Collection[str]) -> None:
        """Give these names up: nobody waits for them any more."""


@dataclass(slots=True, eq=False)
class _Question:
    """What somebody waits for."""

    decided: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None
    waiting: int = 0


class Demand:
    """Questions for the control plane. Connections call `fetch`; the xDS client the rest."""

    def __init__(self, store: Store, *, metrics: Metrics) -> None:
        self._store = store
        self._limit_reached = metrics.limits_reached.count(LIMIT)
        self._open: dict[str, _Question] = {}
        self._absent: OrderedDict[str, float] = OrderedDict()  # name -> believed until
        self._stream: Questions | None = None

    async def fetch(self, what: str) -> Answer:
        """Get an address (`network/ip`, `namespace/hostname` or a uid) into the store.

        Afterwards decide again with `what` among the `fetched`: what is known may still not be
        visible to this client.

        Raises:
            RouteError: the control plane did not answer in time; refuse the connection, because
                the address may well belong to the mesh.
            LimitError: too many addresses are being waited for.
        """
        await trio.lowlevel.checkpoint()
        self._expire(trio.current_time())
        if self._is_known(what):
            return Answer.KNOWN
        if what in self._absent:
            return Answer.ABSENT
        question = self._open.get(what) or self._begin(what)
        question.waiting += 1
        try:
            with trio.move_on_after(WAIT_SECONDS):
                await question.decided.wait()
        finally:
            question.waiting -= 1
            if not question.waiting and self._open.get(what) is question:
                del self._open[what]
                self._give_up([what])
        if question.answer is None:
            raise RouteError(f"no answer from the control plane about {what} in {WAIT_SECONDS:g}s")
        return question.answer

    @property
    def names(self) -> Collection[str]:
        """What is waited for now."""
        return self._open.keys()

    def attach(self, stream: Questions) -> None:
        """Ask on this stream from now on, also what is waited for already."""
        self._stream = stream
        if self._open:
            stream.ask(tuple(self._open))

    def detach(self) -> None:
        """Stop asking; whoever waits goes on waiting for the next stream."""
        self._stream = None

    def answered(self, names: Collection[str]) -> None:
        """Wake those whose question these names answer; the store must be updated before."""
        for what, question in list(self._open.items()):
            known = self._is_known(what)
            if not known and what not in names:
                continue
            question.answer = Answer.KNOWN if known else Answer.ABSENT
            question.decided.set()
            del self._open[what]
            if not known:
                self._absent[what] = trio.current_time() + ABSENT_SECONDS
        self._expire(trio.current_time())

    def _begin(self, what: str) -> _Question:
        if len(self._open) >= NAMES_MAX:
            self._limit_reached.add()
            raise LimitError(f"{NAMES_MAX} addresses are being asked for already")
        question = self._open[what] = _Question()
        if self._stream is not None:
            self._stream.ask([what])
        return question

    def _expire(self, now: float) -> None:
        """Forget that addresses do not exist, the oldest first."""
        expired: list[str] = []
        for what, until in self._absent.items():
            if until > now and len(self._absent) - len(expired) <= ABSENT_MAX:
                break
            expired.append(what)
        for what in expired:
            del self._absent[what]
        if expired:
            self._give_up(expired)

    def _give_up(self, names: Collection[str]) -> None:
        if self._stream is not None:
            self._stream.forget(names)

    def _is_known(self, what: str) -> bool:
        place, _, rest = what.partition("/")
        try:
            ip = parse_ip(rest)
        except ValueError:
            name = NamespacedHostname(Namespace(place), rest)
            return self._store.at_hostname(name) is not None or (
                self._store.workloads.by_uid(WorkloadUid(what)) is not None
            )
        return self._store.at_address(Network(place), ip) is not None
