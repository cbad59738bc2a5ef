"""A worker: the data path of some of a node's connections, told everything by its parent.

It is `python -m ztunnel worker`, with the link as its standard input. It listens in every pod of
the node, as the other workers do; the kernel deals new connections out among them. It knows neither
the control plane, nor the CA, nor the node agent, and it ends with its parent.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, assert_never

import trio
from cryptography import x509

from ztunnel.admin.config_dump import connection_to_dict
from ztunnel.admin.http import gathered
from ztunnel.errors import PeerError, UnreachableError, ZtunnelError
from ztunnel.identity.dev_ca import wall_clock
from ztunnel.inpod.manager import PodManager
from ztunnel.linux.netns import PodNetns
from ztunnel.proxy.node import make_node
from ztunnel.state.settling import Settling
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.log import PIPELINE, get
from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.runtime import watch_loop
from ztunnel.tls.context import TlsContexts
from ztunnel.tls.crl import RevocationList, Revocations
from ztunnel.transport.pace import Pace
from ztunnel.transport.reactor import Reactor
from ztunnel.workers.certificates import HandedCertificates
from ztunnel.workers.link import Link
from ztunnel.workers.messages import (
    Answer,
    Apply,
    Asks,
    Begin,
    Certified,
    Connected,
    Done,
    Drain,
    Learned,
    Leave,
    Levels,
    Lists,
    Metered,
    Order,
    Ping,
    Ready,
    Serve,
    ShowConnections,
    ShowMetrics,
    Wants,
    decode_order,
    encode_answer,
)
from ztunnel.workers.questions import Questions
from ztunnel.workers.sharing import share

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ztunnel.inpod.manager import ServedPod
    from ztunnel.transport.sockets import Socket
    from ztunnel.workers.frames import Frame

CONNECTIONS_PER_PIECE = 200  # about 40 KiB, and a millisecond

log = get("workers")

Start = Callable[[Callable[[], "Awaitable[None]"]], None]


class Worker:
    """The data path of one process; `obey` takes orders, `say` sends answers."""

    def __init__(
        self, begin: Begin, say: Callable[[Answer], None], room: Callable[[], Awaitable[None]]
    ) -> None:
        """Make everything that needs no task; `room` waits until answers have been sent.

        Raises:
            ConfigError: this process cannot do what the operator wants.
        """
        config = begin.config
        PIPELINE.set_up(begin.log_filter, json=config.log_json)
        self._say = say
        self._room = room
        self.store = Store(node=config.node_name or "")
        self.metrics = Metrics(version=config.istio_version)
        self.revocations = None if config.crl_path is None else Revocations()
        self.contexts = TlsContexts.of(config, self.revocations)
        self.certificates = HandedCertificates(
            lambda identity: say(Wants(str(identity))), clock=wall_clock
        )
        on_demand = config.xds_on_demand and config.xds_address is not None
        self.questions = Questions(lambda turn, what: say(Asks(turn, what)))
        reactor = Reactor()
        self.pace = Pace(reactor)
        self.node = make_node(
            config,
            store=self.store,
            certificates=self.certificates,
            tls=self.contexts,
            metrics=self.metrics,
            demand=self.questions if on_demand else None,
            reactor=reactor,
        )
        self.pods = PodManager(self.node)
        self._settling = Settling()
        self._tasks: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            nursery.start_soon(watch_loop, self.metrics, self.node.reactor.take_longest_stall)
            nursery.start_soon(self.node.reactor.run)
            await nursery.start(self.pods.run)
            gc.freeze()  # the program itself, as the control process does
            task_status.started()

    async def obey(self, order: Order, netns: PodNetns | None) -> None:
        """Carry out one order; what takes long goes on in the background. Owns `netns`.

        Raises:
            PeerError: it makes no sense here.
        """
        await trio.lowlevel.checkpoint()
        match order:
            case Serve():
                await self._serve(order, netns)
            case Leave(turn, uid):
                await self.pods.remove(uid)
                self._say(Done(turn))
            case ShowMetrics() | ShowConnections() | Drain():
                assert self._tasks is not None
                self._tasks.start_soon(self._take_time, order)
            case Ping(turn):
                self._say(Done(turn))
            case Begin():
                raise PeerError("told to begin a second time")
            case Apply(update):
                with await self.pace.turn():
                    self._apply(update)
            case _:
                self._learn(order)

    def _learn(self, order: Certified | Learned | Lists | Levels) -> None:
        match order:
            case Certified(identity, certificate, error):
                self.certificates.hand(identity, certificate, error)
                if certificate is None and error is None:
                    self.contexts.forget(identity)
            case Learned(turn, answer, error):
                self.questions.learned(turn, answer, error)
            case Lists(lists):
                self._revoke(lists)
            case Levels(log_filter):
                PIPELINE.set_up(log_filter, json=self.node.config.log_json)
            case _:
                assert_never(order)

    def _apply(self, update: Update) -> None:
        for workload in update.workloads:
            share(workload)
        self.store.apply(update)
        self._settling.came(len(update.workloads) + len(update.services) + len(update.policies))
        self._settling.ended()

    def _revoke(self, lists: tuple[bytes, ...]) -> None:
        if self.revocations is None:
            raise PeerError("revocation lists without CRL_PATH")
        self.revocations.replace(
            [RevocationList.read(x509.load_der_x509_crl(one)) for one in lists]
        )

    async def _serve(self, order: Serve, netns: PodNetns | None) -> None:
        if netns is None:
            raise PeerError(f"pod {order.uid} without its namespace")
        try:
            await self.pods.add(order.uid, order.info, netns)
        except (ZtunnelError, OSError) as error:
            netns.close()
            self._say(Done(order.turn, str(error)))
        else:
            self._say(Done(order.turn))

    async def _take_time(self, order: ShowMetrics | ShowConnections | Drain) -> None:
        match order:
            case ShowMetrics():
                for piece in gathered(self.metrics.text()):
                    self._say(Metered(order.turn, piece.decode()))
                    await self._room()
            case ShowConnections():
                for uid, pod in list(self.pods.pods.items()):
                    await self._show_connections(order.turn, uid, pod)
            case Drain():
                await self.pods.drain(order.seconds)
            case _:
                assert_never(order)
        self._say(Done(order.turn))

    async def _show_connections(self, turn: int, uid: str, pod: ServedPod) -> None:
        live = pod.proxy.context.live
        inbound, outbound = list(live.inbound), list(live.outbound)
        for start in range(0, max(len(inbound), len(outbound)), CONNECTIONS_PER_PIECE):
            piece = slice(start, start + CONNECTIONS_PER_PIECE)
            self._say(
                Connected(
                    turn,
                    uid,
                    [connection_to_dict(one) for one in inbound[piece]],
                    [connection_to_dict(one) for one in outbound[piece]],
                )
            )
            await self._room()


async def run_worker(sock: Socket) -> None:
    """Run a worker on its end of the link, until the other end is gone.

    Raises:
        PeerError: we are not told what makes sense.
        ConfigError: this process cannot do what the operator wants.
    """
    link = Link(sock, "the control process")
    worker: Worker | None = None
    pace = Pace()  # until there are connections

    def say(answer: Answer) -> None:
        link.post(encode_answer(answer))

    async with trio.open_nursery() as nursery:

        async def received(frame: Frame) -> None:
            nonlocal worker, pace
            netns = None if frame.fd is None else PodNetns(frame.fd)
            with await pace.turn():
                order = decode_order(frame.body)
            if worker is not None:
                await worker.obey(order, netns)
            elif isinstance(order, Begin):
                worker = Worker(order, say, link.short)
                pace = worker.pace
                await nursery.start(worker.run)
                say(Ready())
                log.info("worker ready", worker=order.number)
            else:
                raise PeerError(f"the first order is {type(order).__name__}")

        nursery.start_soon(PIPELINE.writer.run)
        try:
            await link.run(received)
        except UnreachableError as error:
            log.debug("worker ends with the control process", error=str(error))
        nursery.cancel_scope.cancel(reason="the control process is gone")
