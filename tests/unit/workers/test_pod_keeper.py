from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ztunnel.errors import UnreachableError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import PodInfo
from ztunnel.workers.messages import Leave, Serve, decode_order
from ztunnel.workers.orders import Orders
from ztunnel.workers.pod_keeper import RETRY_SECONDS, PodKeeper, WantedPod

CART, BANK = PodUid("cart"), PodUid("bank")


class Scene:
    """A worker that answers as it is told to, or at once."""

    def __init__(self, netns: PodNetns) -> None:
        self.netns = netns
        self.wanted: dict[PodUid, WantedPod] = {}
        self.sent: list[tuple[str, PodUid, bool]] = []
        self.refusals: dict[PodUid, str] = {}
        self.is_mute = False
        self.changes = 0
        self.orders = Orders(self._take)
        self.keeper = PodKeeper("worker 0", self.wanted, self.orders, changed=self._changed)

    def want(self, uid: PodUid) -> WantedPod:
        info = PodInfo(uid, Namespace("shop"), ServiceAccount(uid))
        pod = self.wanted[uid] = WantedPod(info, self.netns)
        self.keeper.look()
        return pod

    def unwant(self, uid: PodUid) -> None:
        del self.wanted[uid]
        self.keeper.look()

    def _take(self, body: bytes, fd: int | None) -> None:
        order = decode_order(body)
        assert isinstance(order, Serve | Leave)
        self.sent.append((type(order).__name__, order.uid, fd is not None))
        if not self.is_mute:
            self.orders.done(order.turn, self.refusals.get(order.uid))

    def _changed(self) -> None:
        self.changes += 1


@pytest.fixture
def scene() -> Iterator[Scene]:
    with PodNetns.open("/proc/self/ns/net") as netns:
        yield Scene(netns)


async def test_what_is_wanted_is_served_and_left_again(scene: Scene, nursery: trio.Nursery) -> None:
    pod = scene.want(CART)
    nursery.start_soon(scene.keeper.run)
    await wait_all_tasks_blocked()
    assert scene.sent == [("Serve", CART, True)]
    assert (scene.keeper.standing(CART, pod), scene.keeper.knows(CART)) == ("", True)
    scene.unwant(CART)
    await wait_all_tasks_blocked()
    assert scene.sent[1:] == [("Leave", CART, False)]
    assert not scene.keeper.knows(CART)
    assert scene.changes == 2
    nursery.cancel_scope.cancel()


async def test_a_pod_that_took_the_place_of_another_is_served_anew(
    scene: Scene, nursery: trio.Nursery
) -> None:
    old = scene.want(CART)
    nursery.start_soon(scene.keeper.run)
    await wait_all_tasks_blocked()
    new = scene.want(CART)
    assert scene.keeper.standing(CART, new) is None
    await wait_all_tasks_blocked()
    assert [what for what, *_ in scene.sent] == ["Serve", "Leave", "Serve"]
    assert scene.keeper.standing(CART, old) is None
    assert scene.keeper.standing(CART, new) == ""
    nursery.cancel_scope.cancel()


async def test_a_pod_that_cannot_be_served_is_tried_again_and_holds_up_no_other(
    scene: Scene, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    scene.refusals[CART] = "port 15001 is taken"
    cart, bank = scene.want(CART), scene.want(BANK)
    nursery.start_soon(scene.keeper.run)
    await trio.sleep(RETRY_SECONDS / 2)
    assert scene.keeper.standing(CART, cart) == "port 15001 is taken"
    assert scene.keeper.standing(BANK, bank) == ""
    assert len(scene.sent) == 2
    del scene.refusals[CART]
    await trio.sleep(RETRY_SECONDS)
    assert scene.keeper.standing(CART, cart) == ""
    nursery.cancel_scope.cancel()


async def test_a_refusal_is_forgotten_with_its_pod(scene: Scene, nursery: trio.Nursery) -> None:
    scene.refusals[CART] = "port 15001 is taken"
    scene.want(CART)
    nursery.start_soon(scene.keeper.run)
    await wait_all_tasks_blocked()
    scene.unwant(CART)
    await wait_all_tasks_blocked()
    del scene.refusals[CART]
    pod = scene.want(CART)
    await wait_all_tasks_blocked()
    assert scene.keeper.standing(CART, pod) == ""
    nursery.cancel_scope.cancel()


async def test_a_worker_that_does_not_obey_is_given_up(
    scene: Scene, autojump_clock: MockClock
) -> None:
    scene.is_mute = True
    scene.want(CART)
    with pytest.raises(UnreachableError, match=r"worker 0 has not obeyed within .* serve cart"):
        await scene.keeper.run()
