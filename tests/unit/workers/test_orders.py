from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from ztunnel.workers.messages import Metered, Ping, ShowMetrics, decode_order
from ztunnel.workers.orders import GONE, Orders


class Scene:
    def __init__(self) -> None:
        self.sent: list[tuple[bytes, int | None]] = []
        self.orders = Orders(lambda body, fd: self.sent.append((body, fd)))
        self.outcomes: list[str | None] = []
        self.pieces: list[object] = []

    async def ping(self) -> None:
        self.outcomes.append(await self.orders.carry_out(Ping(self.orders.turn()), fd=7))

    async def show(self) -> None:
        order = ShowMetrics(self.orders.turn())
        self.outcomes.append(await self.orders.carry_out(order, self.pieces.append))


async def test_each_answer_finds_its_order(nursery: trio.Nursery) -> None:
    scene = Scene()
    nursery.start_soon(scene.ping)
    await wait_all_tasks_blocked()
    nursery.start_soon(scene.ping)
    await wait_all_tasks_blocked()
    assert [(decode_order(body), fd) for body, fd in scene.sent] == [(Ping(1), 7), (Ping(2), 7)]
    scene.orders.done(2, "no")
    await wait_all_tasks_blocked()
    assert scene.outcomes == ["no"]
    scene.orders.done(1, None)
    await wait_all_tasks_blocked()
    assert scene.outcomes == ["no", None]


async def test_pieces_come_before_the_end(nursery: trio.Nursery) -> None:
    scene = Scene()
    nursery.start_soon(scene.show)
    await wait_all_tasks_blocked()
    piece = Metered(1, "a 1\n")
    scene.orders.piece(piece)
    scene.orders.piece(Metered(9, "of an order nobody waits for\n"))
    scene.orders.done(1, None)
    await wait_all_tasks_blocked()
    assert (scene.pieces, scene.outcomes) == ([piece], [None])


async def test_when_the_worker_is_gone_nobody_waits(nursery: trio.Nursery) -> None:
    scene = Scene()
    nursery.start_soon(scene.ping)
    await wait_all_tasks_blocked()
    scene.orders.end()
    await scene.ping()
    await wait_all_tasks_blocked()
    assert scene.outcomes == [GONE, GONE]
    assert len(scene.sent) == 1
