"""The control process's side of one worker, which is a script on a real link."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.builders import a_policy, a_workload, an_identity
from tests.support.certs import AUTHORITY
from tests.support.worker_peers import FakeProcess, Script, a_script
from ztunnel.config import Config
from ztunnel.errors import RouteError
from ztunnel.identity.dev_ca import DevelopmentIssuer, wall_clock
from ztunnel.identity.manager import CertificateManager
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.log import PIPELINE
from ztunnel.tls.crl import Revocations, parse_lists
from ztunnel.wire.zds import PodInfo
from ztunnel.workers import handle as module
from ztunnel.workers.handle import Control, WorkerHandle
from ztunnel.workers.messages import (
    Apply,
    Asks,
    Begin,
    Certified,
    Connected,
    Done,
    Drain,
    Learned,
    Levels,
    Lists,
    Metered,
    Ping,
    Ready,
    Serve,
    ShowConnections,
    ShowMetrics,
    Wants,
    decode_order,
)
from ztunnel.workers.pod_keeper import WantedPod

CART = PodUid("cart")
INFO = PodInfo("cart", Namespace("shop"), ServiceAccount("cart"))


class Demand:
    """Answers one address, and has the store know it before."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def fetch(self, what: str) -> object:
        await trio.lowlevel.checkpoint()
        if what != "/192.0.2.10":
            raise RouteError("no answer from the control plane")
        self.store.apply(Update(workloads=[a_workload()]))
        return "known"


@dataclass
class Scene:
    handle: WorkerHandle
    worker: Script
    process: FakeProcess
    control: Control
    pods: dict[PodUid, WantedPod]
    said: list[str]
    ended: list[str] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)

    async def begin(self) -> None:
        await self.worker.next(Begin)
        self.worker.answer(Ready())
        with trio.fail_after(5):
            while not self.handle.is_up:  # noqa: ASYNC110 - it tells its owner only
                await trio.sleep(0.001)

    async def end(self) -> str:
        with trio.fail_after(5):
            await self.over.wait()
        (how,) = self.ended
        return how


@asynccontextmanager
async def a_scene(monkeypatch: pytest.MonkeyPatch, **control: Any) -> AsyncIterator[Scene]:
    said: list[str] = []
    monkeypatch.setattr(PIPELINE.writer, "write", said.append)
    store = Store()
    pods: dict[PodUid, WantedPod] = {}
    certificates = CertificateManager(
        DevelopmentIssuer(AUTHORITY), clock=wall_clock, random=random.Random(1)
    )
    synced = trio.Event()
    synced.set()
    known = Control(
        config=Config(), store=store, certificates=certificates, revocations=None,
        demand=Demand(store), pods=pods, synced=synced, changed=lambda: None,
    )  # fmt: skip
    known = replace(known, **control)
    process = FakeProcess()
    fake: Any = process
    handle = WorkerHandle(0, fake, known)
    async with trio.open_nursery() as nursery, a_script(process.theirs, decode_order) as worker:
        scene = Scene(handle, worker, process, known, pods, said)

        async def run() -> None:
            scene.ended.append(await handle.run())
            scene.over.set()

        await nursery.start(certificates.run)
        nursery.start_soon(run)
        try:
            yield scene
        finally:
            process.kill()
            worker.link.close()
            with trio.move_on_after(5, shield=True):
                await scene.over.wait()
            for fd in worker.fds:
                os.close(fd)
            nursery.cancel_scope.cancel()


async def test_a_new_worker_is_told_all_before_any_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    revocations = Revocations()
    lists = parse_lists(AUTHORITY.revoke(1, 2))
    revocations.replace(lists)
    async with a_scene(monkeypatch, revocations=revocations) as scene:
        store = scene.control.store
        store.apply(Update(policies=[a_policy()], workloads=[a_workload()]))
        await scene.control.certificates.certificate_for(an_identity())
        with PodNetns.open("/proc/self/ns/net") as netns:
            scene.pods[CART] = WantedPod(INFO, netns)
            await scene.begin()
            await scene.worker.next(Serve)
        kinds = [type(one).__name__ for one in scene.worker.received]
        assert kinds == ["Lists", "Certified", "Apply"]
        assert await scene.worker.next(Lists) == Lists((lists[0].der(),))
        told = (await scene.worker.next(Apply)).update
        assert (told.workloads, told.policies) == ((a_workload(),), (a_policy(),))
        assert len(scene.worker.fds) == 1


async def test_no_pod_is_served_before_the_state_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch, synced=trio.Event()) as scene:
        await scene.worker.next(Begin)
        scene.worker.answer(Ready())
        with PodNetns.open("/proc/self/ns/net") as netns:
            scene.pods[CART] = WantedPod(INFO, netns)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not scene.handle.is_up
            scene.control.store.apply(Update(policies=[a_policy()]))
            scene.control.synced.set()
            await scene.worker.next(Serve)
        assert (await scene.worker.next(Apply)).update.policies == (a_policy(),)


async def test_changes_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        scene.handle.tell_if_ready(Levels("debug"))  # part of what it is told when it begins
        await scene.begin()
        scene.control.store.apply(Update(workloads=[a_workload()]))
        assert (await scene.worker.next(Apply)).update.workloads == (a_workload(),)
        scene.handle.tell_if_ready(Levels("warn"))
        assert await scene.worker.next(Levels) == Levels("warn")


async def test_a_certificate_is_fetched_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.begin()
        who = an_identity()
        scene.worker.answer(Wants(str(who)))
        handed = await scene.worker.next(Certified)
        assert handed.certificate is not None
        assert (handed.identity, handed.certificate.identity) == (who, who)


async def test_what_an_answer_brought_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.begin()
        scene.worker.answer(Asks(5, "/192.0.2.10"))
        assert (await scene.worker.next(Learned)).turn == 5
        assert (await scene.worker.next(Apply)).update.workloads == (a_workload(),)
        scene.worker.answer(Asks(6, "/192.0.2.99"))
        refused = await scene.worker.next(Learned)
        assert refused == Learned(6, None, "no answer from the control plane")


async def test_it_is_asked_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene, trio.open_nursery() as nursery:
        await scene.begin()
        texts: list[str] = []
        pieces: list[Connected] = []
        nursery.start_soon(scene.handle.show_metrics, texts.append)
        nursery.start_soon(scene.handle.show_connections, pieces.append)
        nursery.start_soon(scene.handle.drain, 3.0)
        order = await scene.worker.next(ShowMetrics)
        for answer in (
            Metered(order.turn, "a 1\n"),
            Metered(order.turn, "b 2\n"),
            Done(order.turn),
        ):
            scene.worker.answer(answer)
        shown = await scene.worker.next(ShowConnections)
        piece = Connected(shown.turn, CART, [], [{"src": "192.0.2.1:5"}])
        scene.worker.answer(piece)
        scene.worker.answer(Done(shown.turn))
        drain = await scene.worker.next(Drain)
        assert drain.seconds == 3.0
        scene.worker.answer(Done(drain.turn))
    assert (texts, pieces) == (["a 1\n", "b 2\n"], [piece])


async def test_its_lines_are_passed_on_to_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_scene(monkeypatch) as scene:
        await scene.begin()
        os.write(scene.process.prints, b"one\ntwo\nlast words")
        scene.worker.link.close()
        scene.process.end()
        assert await scene.end() == "exit status 0 (worker 0 has closed the link)"
        assert [line for line in scene.said if "\t" not in line] == [
            "one\n",
            "two\n",
            "last words\n",
        ]


async def test_one_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_SECONDS", 0.01)
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.1)
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    async with a_scene(monkeypatch) as scene:
        await scene.begin()
        ping = await scene.worker.next(Ping)
        scene.worker.answer(Done(ping.turn))
        await scene.worker.next(Ping)
        assert await scene.end() == "killed by SIGKILL (worker 0 has not answered for 0.1 s)"
        assert not scene.handle.is_up


async def test_one_that_does_not_come_up_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.1)
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    async with a_scene(monkeypatch) as scene:
        assert "worker 0 was not up within 0.1 s" in await scene.end()


@pytest.mark.parametrize(
    ("nonsense", "complaint"),
    [
        (Wants("https://cart"), "not an Istio SPIFFE identity"),
        (Asks(1, "/10.0.0.1"), "all are known"),
    ],
)
async def test_one_that_asks_for_nonsense_is_ended(
    nonsense: Wants | Asks, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    async with a_scene(monkeypatch, demand=None) as scene:
        await scene.begin()
        scene.worker.answer(nonsense)
        assert complaint in await scene.end()


async def test_one_that_asks_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    monkeypatch.setattr(module, "TASKS_MAX", 10)

    class Mute:
        async def fetch(self, what: str) -> object:
            await trio.sleep_forever()

    async with a_scene(monkeypatch, demand=Mute()) as scene:
        await scene.begin()
        for turn in range(11):
            scene.worker.answer(Asks(turn, "/10.0.0.1"))
        assert "waits for more than 10 answers" in await scene.end()


async def test_a_bug_of_ours_costs_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_SECONDS", 0.1)

    class Broken:
        async def fetch(self, what: str) -> object:
            raise KeyError(what)

    async with a_scene(monkeypatch, demand=Broken()) as scene:
        await scene.begin()
        scene.worker.answer(Asks(1, "/10.0.0.1"))
        assert "a bug in the control process" in await scene.end()
        assert any("failed unexpectedly" in line for line in scene.said)
