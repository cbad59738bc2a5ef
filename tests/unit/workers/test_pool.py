"""Scripted workers behind one pool: what one of them does, the node agent does not notice."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.support.certs import AUTHORITY
from tests.support.worker_peers import FakeProcess, Script
from ztunnel.config import Config
from ztunnel.errors import ConfigError, UnreachableError
from ztunnel.identity.dev_ca import DevelopmentIssuer
from ztunnel.identity.node import NodeCredentials
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.state.store import Store
from ztunnel.telemetry.log import PIPELINE
from ztunnel.telemetry.metrics import Metrics
from ztunnel.wire.zds import PodInfo
from ztunnel.workers import handle as handle_module, pool as module
from ztunnel.workers.messages import (
    Begin,
    Connected,
    Done,
    Drain,
    Leave,
    Levels,
    Metered,
    Order,
    Ping,
    Ready,
    Serve,
    ShowConnections,
    ShowMetrics,
    decode_order,
)
from ztunnel.workers.pool import WorkerPool
from ztunnel.workers.process import WorkerProcess

CART = PodUid("cart")
INFO = PodInfo("cart", Namespace("shop"), ServiceAccount("cart"))
SECONDS = 10.0
OPENED = "istio_tcp_connections_opened"


class Worker(Script):
    """Obeys at once, but for what a test tells it not to."""

    def __init__(self, process: FakeProcess, scene: Scene) -> None:
        super().__init__(process.theirs, decode_order)
        self.process = process
        self.scene = scene
        self.pods: set[PodUid] = set()
        self.levels: list[str] = []
        self.opened = 0

    async def _take(self, frame: object) -> None:
        await super()._take(frame)  # type: ignore[arg-type]
        order = self.received.pop()
        while self.fds:
            os.close(self.fds.pop())
        self._obey(order)  # type: ignore[arg-type]

    def _obey(self, order: Order) -> None:
        match order:
            case Begin():
                self.answer(Ready())
            case Serve(turn, uid):
                if self.scene.is_deaf:
                    return
                if self.scene.refusal is None:
                    self.pods.add(uid)
                self.answer(Done(turn, self.scene.refusal))
            case Leave(turn, uid):
                self.pods.discard(uid)
                self.answer(Done(turn))
            case Levels(log_filter):
                self.levels.append(log_filter)
            case ShowMetrics() | ShowConnections():
                self._show(order)
            case Ping(turn) | Drain(turn):
                self.answer(Done(turn))
            case _:
                pass

    def _show(self, order: ShowMetrics | ShowConnections) -> None:
        if isinstance(order, ShowMetrics):
            head = f"# HELP {OPENED} x\n# TYPE {OPENED} counter\n"
            self.answer(Metered(order.turn, f"{head}{OPENED}_total {self.opened}\n"))
        else:
            for uid in self.pods:
                self.answer(Connected(order.turn, uid, [{"src": "192.0.2.1:5"}], []))
        self.answer(Done(order.turn))

    def die(self) -> None:
        self.process.kill()
        self.link.close()


class Scene:
    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.refusal: str | None = None
        self.is_deaf = False
        self.ups: list[bool] = []
        self.pool: WorkerPool = None  # type: ignore[assignment]
        self.netns = PodNetns.open("/proc/self/ns/net")

    @property
    def alive(self) -> list[Worker]:
        return [one for one in self.workers if not one.process.ended.is_set()]

    async def until_up(self, count: int) -> None:
        with trio.fail_after(SECONDS):
            while len(self.pool._serving()) < count:  # noqa: ASYNC110 - tells its owner only
                await trio.sleep(0.005)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PIPELINE.writer, "write", lambda _: None)
    monkeypatch.setattr(handle_module, "END_SECONDS", 0.1)
    before = str(PIPELINE.filter)
    yield
    PIPELINE.set_up(before, json=False)


@asynccontextmanager
async def a_scene(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> AsyncIterator[Scene]:
    scene = Scene()
    async with trio.open_nursery() as scripts, trio.open_nursery() as nursery:

        def start() -> FakeProcess:
            process = FakeProcess()
            worker = Worker(process, scene)
            scene.workers.append(worker)
            scripts.start_soon(worker.run)
            return process

        monkeypatch.setattr(WorkerProcess, "start", start)
        config = Config(fake_ca=True, worker_threads=count)
        store, metrics = Store(), Metrics()
        credentials = NodeCredentials(config, store, metrics, DevelopmentIssuer(AUTHORITY))
        scene.pool = WorkerPool(
            config, store=store, credentials=credentials, demand=None, metrics=metrics,
            on_up=scene.ups.append,
        )  # fmt: skip
        nursery.start_soon(scene.pool.run)
        with trio.fail_after(SECONDS):
            await scene.pool.begin()
        try:
            yield scene
        finally:
            nursery.cancel_scope.cancel()
            scripts.cancel_scope.cancel()
            scene.netns.close()
            for worker in scene.alive:
                worker.die()


def shown(pool: WorkerPool) -> dict[str, object]:
    section = pool.section()
    return {name: section.show(one) for name, one in section.items()}


async def test_a_pod_is_acknowledged_when_all_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch, 3) as scene:
        assert scene.ups == [True]
        await scene.pool.add(CART, INFO, scene.netns.duplicate())
        assert [worker.pods for worker in scene.workers] == [{CART}] * 3
        await scene.pool.add(CART, INFO, scene.netns.duplicate())  # the same again
        await scene.pool.reconcile(frozenset())
        assert [worker.pods for worker in scene.workers] == [set()] * 3
        await scene.pool.remove(CART)


async def test_a_pod_that_one_cannot_serve_is_served_by_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_scene(monkeypatch) as scene:
        scene.refusal = "port 15001 is taken"
        netns = scene.netns.duplicate()
        with pytest.raises(ConfigError, match="port 15001 is taken"):
            await scene.pool.add(CART, INFO, netns)
        scene.refusal = None
        await scene.pool.add(CART, INFO, netns)  # it stayed ours


async def test_a_pod_that_nobody_serves_in_time_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SERVE_SECONDS", 0.05)
    async with a_scene(monkeypatch) as scene:
        scene.is_deaf = True
        netns = scene.netns.duplicate()
        with pytest.raises(UnreachableError, match="no worker serves the pod"):
            await scene.pool.add(CART, INFO, netns)
        netns.close()


async def test_who_takes_the_place_of_a_dead_worker_serves_its_pods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.pool.add(CART, INFO, scene.netns.duplicate())
        for worker in list(scene.workers):
            worker.opened = 5
        await scene.pool.gather_metrics()
        scene.workers[0].die()
        await scene.until_up(1)
        with trio.fail_after(SECONDS):
            while len(scene.workers) < 3 or CART not in scene.workers[2].pods:  # noqa: ASYNC110
                await trio.sleep(0.005)
        await scene.until_up(2)
        assert scene.ups == [True]
        scene.workers[2].opened = 1
        await scene.pool.gather_metrics()
        text = "".join(scene.pool.text())
        assert f"{OPENED}_total 11\n" in text
        assert sum("ztunnel_worker_restarts_total{" in line for line in text.splitlines()) == 1


async def test_a_pod_is_not_kept_waiting_by_a_worker_that_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_scene(monkeypatch) as scene, trio.open_nursery() as nursery:
        scene.is_deaf = True
        nursery.start_soon(scene.pool.add, CART, INFO, scene.netns.duplicate())
        await trio.testing.wait_all_tasks_blocked(0.02)
        scene.is_deaf = False
        for worker in list(scene.workers):
            worker.die()
        with trio.fail_after(SECONDS):
            while not any(one.pods for one in scene.alive):  # noqa: ASYNC110
                await trio.sleep(0.005)
        assert scene.ups[:2] == [True, False]


async def test_all_are_drained_and_none_is_replaced_then(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.pool.drain(1.0)
        for worker in list(scene.workers):
            worker.die()
        with trio.fail_after(SECONDS):
            while scene.pool._handles:  # noqa: ASYNC110 - nobody waits for that but a test
                await trio.sleep(0.005)
        assert len(scene.workers) == 2


async def test_levels_and_connections_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.pool.add(CART, INFO, scene.netns.duplicate())
        changed = scene.pool.change("access=off")
        await scene.pool.gather_connections()  # an order later: the levels have arrived
        assert [worker.levels for worker in scene.workers] == [[str(changed)]] * 2
        pod = shown(scene.pool)[CART]
        assert isinstance(pod, dict)
        assert len(pod["connections"]["inbound"].items) == 2
