from __future__ import annotations

from collections.abc import Collection

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.builders import a_service, a_store, a_workload
from ztunnel.errors import LimitError, RouteError
from ztunnel.model.workload import NetworkMode
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.metrics import Metrics
from ztunnel.xds import demand as module
from ztunnel.xds.demand import ABSENT_SECONDS, WAIT_SECONDS, Answer, Demand

CART = a_workload("cart-0", ips=["192.0.2.10"])
WHERE = "/192.0.2.10"


class Asked:
    """A stream that remembers what was asked for and given up."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.forgotten: list[str] = []

    def ask(self, names: Collection[str]) -> None:
        self.asked += names

    def forget(self, names: Collection[str]) -> None:
        self.forgotten += names


def a_demand(store: Store | None = None, *, attached: bool = True) -> tuple[Demand, Store, Asked]:
    store, stream = store or Store(), Asked()
    demand = Demand(store, metrics=Metrics())
    if attached:
        demand.attach(stream)
    return demand, store, stream


class Waiter:
    """Fetches in a task of its own and keeps what came of it."""

    def __init__(self, demand: Demand, nursery: trio.Nursery, what: str = WHERE) -> None:
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, demand, what)

    async def _run(self, demand: Demand, what: str) -> None:
        with self.scope:
            try:
                self.answer = await demand.fetch(what)
            except (RouteError, LimitError) as exc:
                self.error = exc


@pytest.mark.parametrize(
    "what",
    [WHERE, "lab//Pod/shop/cart-0", "/10.0.0.1", "/10.9.8.7", "shop/cart.shop.svc.cluster.local"],
)
async def test_what_is_known_is_not_asked_for(what: str) -> None:
    demand, _, stream = a_demand(a_store(CART, a_service(vips=["10.0.0.1"], cidrs=["10.9.0.0/16"])))
    assert await demand.fetch(what) is Answer.KNOWN
    assert stream.asked == []


async def test_many_who_lack_the_same_share_one_question(autojump_clock: MockClock) -> None:
    demand, store, stream = a_demand()
    async with trio.open_nursery() as nursery:
        waiters = [Waiter(demand, nursery) for _ in range(50)]
        await wait_all_tasks_blocked()
        assert stream.asked == [WHERE]
        store.apply(Update(workloads=[CART]))
        demand.answered({CART.uid, WHERE})
    assert {waiter.answer for waiter in waiters} == {Answer.KNOWN}
    assert stream.forgotten == []


async def test_a_waiter_is_woken_by_what_lies_in_a_range_it_did_not_name(
    autojump_clock: MockClock,
) -> None:
    demand, store, _ = a_demand()
    async with trio.open_nursery() as nursery:
        waiter = Waiter(demand, nursery, "/10.9.8.7")
        await wait_all_tasks_blocked()
        store.apply(Update(services=[a_service(cidrs=["10.9.0.0/16"])]))
        demand.answered({"shop/cart.shop.svc.cluster.local", "/10.9.0.0/16"})
    assert waiter.answer is Answer.KNOWN


async def test_an_answer_about_something_else_wakes_nobody(autojump_clock: MockClock) -> None:
    demand, _, _ = a_demand()
    async with trio.open_nursery() as nursery:
        waiter = Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        demand.answered({"/192.0.2.99"})
        await wait_all_tasks_blocked()
        assert waiter.answer is None
        assert list(demand.names) == [WHERE]
        nursery.cancel_scope.cancel()


async def test_what_does_not_exist_is_believed_for_a_while(autojump_clock: MockClock) -> None:
    demand, _, stream = a_demand()
    async with trio.open_nursery() as nursery:
        waiter = Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        demand.answered({WHERE})
    assert waiter.answer is Answer.ABSENT
    assert await demand.fetch(WHERE) is Answer.ABSENT
    assert stream.asked == [WHERE]
    await trio.sleep(ABSENT_SECONDS)
    async with trio.open_nursery() as nursery:
        Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        assert stream.forgotten == [WHERE]
        assert stream.asked == [WHERE, WHERE]
        nursery.cancel_scope.cancel()


async def test_what_was_absent_and_came_is_known(autojump_clock: MockClock) -> None:
    demand, store, _ = a_demand()
    async with trio.open_nursery() as nursery:
        Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        demand.answered({WHERE})
    store.apply(Update(workloads=[CART]))
    assert await demand.fetch(WHERE) is Answer.KNOWN


async def test_a_named_workload_that_owns_no_address_leaves_it_absent(
    autojump_clock: MockClock,
) -> None:
    demand, store, _ = a_demand()
    async with trio.open_nursery() as nursery:
        waiter = Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        on_host = a_workload("host", ips=["192.0.2.10"], network_mode=NetworkMode.HOST_NETWORK)
        store.apply(Update(workloads=[on_host]))
        demand.answered({on_host.uid, WHERE})
    assert waiter.answer is Answer.ABSENT


async def test_without_an_answer_the_wait_ends_and_the_name_is_given_up(
    autojump_clock: MockClock,
) -> None:
    demand, _, stream = a_demand()
    before = trio.current_time()
    with pytest.raises(RouteError, match="no answer from the control plane about /192"):
        await demand.fetch(WHERE)
    assert trio.current_time() - before == pytest.approx(WAIT_SECONDS)
    assert stream.forgotten == [WHERE]
    assert list(demand.names) == []


async def test_the_name_is_given_up_only_when_the_last_waiter_leaves(
    autojump_clock: MockClock,
) -> None:
    demand, _, stream = a_demand()
    async with trio.open_nursery() as nursery:
        one, other = Waiter(demand, nursery), Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        one.scope.cancel()
        await wait_all_tasks_blocked()
        assert stream.forgotten == []
        other.scope.cancel()
    assert stream.forgotten == [WHERE]


async def test_a_question_outlives_the_stream_it_was_asked_on(autojump_clock: MockClock) -> None:
    demand, store, first = a_demand()
    async with trio.open_nursery() as nursery:
        waiter = Waiter(demand, nursery)
        await wait_all_tasks_blocked()
        demand.detach()
        Waiter(demand, nursery, "/192.0.2.11")
        await wait_all_tasks_blocked()
        second = Asked()
        demand.attach(second)
        assert (first.asked, second.asked) == ([WHERE], [WHERE, "/192.0.2.11"])
        store.apply(Update(workloads=[CART]))
        demand.answered({WHERE, "/192.0.2.11"})
    assert waiter.answer is Answer.KNOWN


async def test_the_number_of_open_questions_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(module, "NAMES_MAX", 2)
    metrics = Metrics()
    demand = Demand(Store(), metrics=metrics)
    async with trio.open_nursery() as nursery:
        waiters = []
        for number in (1, 2, 3, 1):
            waiters.append(Waiter(demand, nursery, f"/192.0.2.{number}"))
            await wait_all_tasks_blocked()
        refused = [isinstance(waiter.error, LimitError) for waiter in waiters]
        assert refused == [False, False, True, False]
        nursery.cancel_scope.cancel()
    assert 'ztunnel_limits_reached_total{limit="on_demand_names"} 1' in "".join(metrics.text())


async def test_the_memory_of_what_does_not_exist_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(module, "ABSENT_MAX", 2)
    demand, _, stream = a_demand()
    names = [f"/192.0.2.{i}" for i in range(1, 5)]
    for name in names:
        async with trio.open_nursery() as nursery:
            Waiter(demand, nursery, name)
            await wait_all_tasks_blocked()
            demand.answered({name})
    assert stream.forgotten == names[:2]
