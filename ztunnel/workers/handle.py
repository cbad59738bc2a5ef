"""One worker as the control process sees it: tells it everything, and keeps what it answers.

How it works: nothing is a call that is made once to all workers. There is what each worker should
know (the store, the certificates, the pods), and for each worker a task that brings it there. So a
worker that takes another's place is treated like any other, and one that is slow holds up nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import trio

from ztunnel.errors import IdentityError, PeerError, UnreachableError, ZtunnelError, first
from ztunnel.model.identity import Identity
from ztunnel.telemetry.log import PIPELINE, get
from ztunnel.workers.feed import Feed
from ztunnel.workers.link import Link
from ztunnel.workers.messages import (
    ANSWER_BYTES_MAX,
    Answer,
    Apply,
    Asks,
    Begin,
    Certified,
    Connected,
    Done,
    Drain,
    Learned,
    Lists,
    Metered,
    Order,
    Ping,
    Ready,
    ShowConnections,
    ShowMetrics,
    Wants,
    decode_answer,
    encode_order,
)
from ztunnel.workers.orders import Orders
from ztunnel.workers.output import Lines
from ztunnel.workers.pod_keeper import PodKeeper, WantedPod

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.identity.manager import CertificateManager
    from ztunnel.model.workload import PodUid
    from ztunnel.proxy.context import AddressSource
    from ztunnel.state.store import Changes, Store
    from ztunnel.tls.crl import Revocations
    from ztunnel.workers.frames import Frame
    from ztunnel.workers.orders import Piece
    from ztunnel.workers.process import WorkerProcess

log = get("workers")

START_SECONDS = 60.0  # to import and be told; far more than it takes
PING_SECONDS = 5.0
STUCK_SECONDS = 20.0  # without an answer to a ping: its pods are as good as unserved
END_SECONDS = 2.0  # to end by itself once the link is closed
# Lines are collected for so long: woken for each of them, we would cost as much as what they tell.
GATHER_SECONDS = 0.05
# What a worker may wait for at once. One with more is broken, or no longer ours.
TASKS_MAX = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What the control process knows, and all workers are to know."""

    config: Config
    store: Store
    certificates: CertificateManager
    revocations: Revocations | None
    demand: AddressSource | None
    pods: Mapping[PodUid, WantedPod]
    synced: trio.Event  # the store holds what it needs to judge connections
    changed: Callable[[], None]  # called when a worker is up, or has served or left a pod


class WorkerHandle:
    """One worker. Make it, and `run` it to its end in any case."""

    def __init__(self, number: int, process: WorkerProcess, control: Control) -> None:
        """Take over a process that has just been started."""
        self.number = number
        self.process = process
        self.is_up = False  # it knows the state, and takes pods
        self._control = control
        self._link = Link(process.link, f"worker {number}", most=ANSWER_BYTES_MAX)
        self._feed = Feed(control.store)
        self._unsubscribe = control.store.subscribe(self._on_change)
        self._told = trio.Event()  # something was added to what it must be told
        self._fed = trio.Event()
        self._ready = trio.Event()
        self._orders = Orders(self._link.post)
        name = f"worker {number}"
        self.pods = PodKeeper(name, control.pods, self._orders, changed=control.changed)
        self._tasks: trio.Nursery | None = None
        self._lines = Lines()

    async def run(self) -> str:
        """Guide the worker until it ends, or is ended because it does not obey; say how."""
        problem = ""
        try:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                nursery.start_soon(self._pass_on_output)
                nursery.start_soon(self._guide)
                await self._link.run(self._received)
        except* (PeerError, UnreachableError) as group:
            problem = str(first(group))
        except* Exception:  # a bug of ours costs this worker, and no other
            log.exception("a worker's guide failed unexpectedly", worker=self.number)
            problem = "a bug in the control process"
        finally:
            self._unsubscribe()
            self.is_up = False
            self._orders.end()
            with trio.CancelScope(shield=True):
                status = await self._end()
        return f"{status} ({problem})"

    # What it is to know.

    def tell(self, order: Order) -> None:
        """Send an order that needs no answer."""
        self._link.post(encode_order(order))

    def tell_if_ready(self, order: Order) -> None:
        """Send it to a worker that has begun; one that has not is told all of it then."""
        if self._ready.is_set():
            self.tell(order)

    # What it is asked.

    async def show_metrics(self, on_text: Callable[[str], None]) -> bool:
        """Ask for its metrics; whether all have come. `on_text` may raise PeerError."""

        def take(piece: Piece) -> None:
            if isinstance(piece, Metered):
                on_text(piece.text)

        return await self._orders.carry_out(ShowMetrics(self._orders.turn()), take) is None

    async def show_connections(self, on_piece: Callable[[Connected], None]) -> bool:
        """Ask which connections are in progress; whether all have come."""

        def take(piece: Piece) -> None:
            if isinstance(piece, Connected):
                on_piece(piece)

        return await self._orders.carry_out(ShowConnections(self._orders.turn()), take) is None

    async def drain(self, seconds: float) -> None:
        """Have it drain, and wait until it has, or is gone."""
        await self._orders.carry_out(Drain(self._orders.turn(), seconds))

    # Telling.

    async def _guide(self) -> None:
        control = self._control
        self.tell(Begin(control.config, self.number, str(PIPELINE.filter)))
        with trio.move_on_after(START_SECONDS) as starting:
            await self._ready.wait()
        if starting.cancelled_caught:
            raise UnreachableError(f"worker {self.number} was not up within {START_SECONDS:g} s")
        self._tell_security()
        await control.synced.wait()
        await self._tell_state()
        self.is_up = True
        control.changed()
        assert self._tasks is not None
        self._tasks.start_soon(self.pods.run)
        self._tasks.start_soon(self._watch)
        while True:
            self._told = trio.Event()
            await self._tell_state()
            await self._told.wait()

    def _tell_security(self) -> None:
        """Tell what must be known before any connection is judged."""
        if self._control.revocations is not None:
            self.tell(Lists(self._control.revocations.in_force()))
        for status in self._control.certificates.snapshot():
            if status.certificate is not None:
                self.tell(Certified(status.identity, status.certificate))

    async def _tell_state(self) -> None:
        await trio.lowlevel.checkpoint()
        while (part := self._feed.take()) is not None:
            self.tell(Apply(part))
            await self._link.short()
        self._fed.set()

    def _on_change(self, changes: Changes) -> None:
        self._feed.changed(changes)
        if self._fed.is_set():
            self._fed = trio.Event()
        self._told.set()

    async def _watch(self) -> NoReturn:
        """End a worker that does not answer any more."""
        while True:
            await trio.sleep(PING_SECONDS)
            with trio.move_on_after(STUCK_SECONDS) as waiting:
                await self._orders.carry_out(Ping(self._orders.turn()))
            if waiting.cancelled_caught:
                raise UnreachableError(
                    f"worker {self.number} has not answered for {STUCK_SECONDS:g} s"
                )

    # Listening.

    async def _received(self, frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        answer = decode_answer(frame.body)
        match answer:
            case Ready():
                self._ready.set()
            case Done():
                self._orders.done(answer.turn, answer.error)
            case Metered() | Connected():
                self._orders.piece(answer)
            case _:
                self._start_answering(answer)

    def _start_answering(self, answer: Answer) -> None:
        assert self._tasks is not None
        if len(self._tasks.child_tasks) > TASKS_MAX:
            raise PeerError(f"worker {self.number} waits for more than {TASKS_MAX} answers")
        if isinstance(answer, Wants):
            try:
                identity = Identity.parse(answer.identity)
            except ValueError as exc:
                raise PeerError(f"worker {self.number}: {exc}") from exc
            self._tasks.start_soon(self._certify, identity)
        elif isinstance(answer, Asks):
            self._tasks.start_soon(self._learn, answer)

    async def _certify(self, identity: Identity) -> None:
        try:
            certificate = await self._control.certificates.certificate_for(identity)
        except IdentityError as error:
            text = str(error).removeprefix("identity error: ")
            self.tell(Certified(identity, None, text))
        else:
            self.tell(Certified(identity, certificate))

    async def _learn(self, question: Asks) -> None:
        demand = self._control.demand
        if demand is None:
            raise PeerError(f"worker {self.number} asks for an address, and all are known")
        try:
            answer = await demand.fetch(question.what)
        except ZtunnelError as error:
            self.tell(Learned(question.turn, None, str(error)))
            return
        while self._feed:  # what the answer brought goes first
            await self._fed.wait()
        self.tell(Learned(question.turn, getattr(answer, "value", "")))

    async def _pass_on_output(self) -> None:
        while data := await self.process.read():
            self._write(self._lines.receive(data))
            await trio.sleep(GATHER_SECONDS)

    def _write(self, lines: list[str]) -> None:
        for line in lines:
            PIPELINE.writer.write(line)

    async def _end(self) -> str:
        """See to it that the process ends; pass on its last words."""
        self._link.close()
        with trio.move_on_after(END_SECONDS):
            async with trio.open_nursery() as nursery:  # it may have much to say yet
                nursery.start_soon(self._pass_on_output)
                await self.process.wait()
                nursery.cancel_scope.cancel(reason="the process has ended")
        self.process.kill()
        await self.process.wait()
        while data := self.process.read_now():
            self._write(self._lines.receive(data))
        self._write(self._lines.end())
        return self.process.close()
