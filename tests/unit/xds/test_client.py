"""The client against streams that are scripted, on a clock that jumps."""

from __future__ import annotations

import gc
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.errors import CallError
from ztunnel.model.policy import PolicyScope
from ztunnel.state import settling
from ztunnel.state.policies import STAGED_PER_STEP
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics
from ztunnel.transport.grpc_access import LOCAL
from ztunnel.transport.pace import Pace
from ztunnel.wire.delta import RESOURCES_PER_STEP, Arrived, DeltaSession, NodeInfo, Subscription
from ztunnel.wire.delta_server import RESOURCES_PER_RESPONSE, ServerStream, Snapshot
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.xds.backoff import MAX_SECONDS
from ztunnel.xds.client import XdsClient, as_update
from ztunnel.xds.demand import ABSENT_SECONDS, Answer, Demand

NODE = NodeInfo("ztunnel~192.0.2.1~a.b~b.svc.cluster.local", {})
CART = a_workload("cart-0", workload_type="pod", cluster_id="Kubernetes")
MESH = Snapshot([CART, a_service(vips=["10.0.0.1"]), a_policy()])


class FakeStream:
    """A stream whose server is in this process; `end` says how it ends."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.server = ServerStream()
        self.snapshot = snapshot
        self.has_answered = False
        self.is_closed = False
        self.requests: list[bytes] = []
        self._error: CallError | None = None
        self._messages, self._inbox = trio.open_memory_channel[bytes](100)

    def send(self, *pieces: bytes) -> None:
        message = b"".join(pieces)
        self.requests.append(message)
        for response in self.server.receive(message, self.snapshot):
            self.deliver(response)

    def deliver(self, message: bytes) -> None:
        self._messages.send_nowait(message)

    def push(self, snapshot: Snapshot) -> None:
        for response in self.server.push(snapshot):
            self.deliver(response)

    def end(self, error: CallError | None = None) -> None:
        self._error = error
        self._messages.close()

    async def receive(self) -> bytes | None:
        try:
            message = await self._inbox.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            return None
        self.has_answered = True
        return message


class Lab:
    """A client, its store and the streams it opened."""

    def __init__(self, *, on_demand: bool = False) -> None:
        self.store, self.metrics = Store(), Metrics()
        self.snapshot = MESH
        self.streams: list[FakeStream] = []
        self.opened_at: list[float] = []
        self.ready = 0
        self.refuse: Callable[[], CallError | None] = lambda: None
        self.demand = Demand(self.store, metrics=self.metrics) if on_demand else None
        self.session = DeltaSession(
            NODE, [Subscription(ADDRESS_TYPE, not on_demand), Subscription(AUTHORIZATION_TYPE)]
        )
        self.client = XdsClient(
            self.session,
            self.store,
            connect=self.connect,
            metrics=self.metrics,
            rng=Random(1),
            on_ready=self.on_ready,
            demand=self.demand,
            pace=Pace(clock=itertools.count().__next__),  # one step in each turn
        )

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[FakeStream]:
        await trio.lowlevel.checkpoint()
        self.opened_at.append(trio.current_time())
        if error := self.refuse():
            raise error
        stream = FakeStream(self.snapshot)
        self.streams.append(stream)
        try:
            yield stream
        finally:
            stream.is_closed = True

    def on_ready(self) -> None:
        self.ready += 1

    def count(self, sample: str) -> float:
        lines = "".join(self.metrics.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(sample))


async def test_a_first_sync_fills_the_store_and_makes_us_ready_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    assert list(lab.store.workloads.all()) == [CART]
    assert (len(lab.store.services), len(lab.store.policies)) == (1, 1)
    assert lab.ready == 1
    lab.streams[0].push(Snapshot())
    await wait_all_tasks_blocked()
    assert len(lab.store.workloads) == len(lab.store.services) == len(lab.store.policies) == 0
    assert lab.ready == 1
    assert lab.count(f'istio_xds_message_total{{url="{ADDRESS_TYPE}"}}') == 2
    assert lab.count(f'istio_xds_message_bytes_total{{url="{ADDRESS_TYPE}"}}') > 50


async def test_a_resource_we_refuse_does_not_keep_us_from_being_ready(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    lab.snapshot = Snapshot()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    bad = pb.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, resources=[pb.Resource(name="x")])
    bad.nonce = "n"
    lab.streams[0].deliver(bad.SerializeToString())
    await wait_all_tasks_blocked()
    assert lab.ready == 1
    assert lab.streams[0].server.refusals == ["x: is of type ''"]
    assert lab.count("ztunnel_xds_rejected_resources_total") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(None, "Complete", id="a clean close"),
        pytest.param(CallError("x", status="UNAVAILABLE"), "Reconnect", id="the line broke"),
        pytest.param(CallError("x", status="RESOURCE_EXHAUSTED"), "Error", id="a server's no"),
    ],
)
async def test_a_stream_that_ends_is_opened_again_and_the_state_stays(
    error: CallError | None, reason: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    lab.streams[0].end(error)
    await wait_all_tasks_blocked()
    assert lab.streams[0].is_closed
    assert list(lab.store.workloads.all()) == [CART]
    assert lab.count(f'istio_xds_connection_terminations_total{{reason="{reason}"}}') == 1
    await trio.sleep(MAX_SECONDS)
    again = [pb.DeltaDiscoveryRequest.FromString(data) for data in lab.streams[1].requests]
    assert again[0].initial_resource_versions[CART.uid] != ""
    assert lab.opened_at[1] > lab.opened_at[0]


async def test_what_went_while_we_were_away_is_removed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    lab.snapshot = Snapshot([a_policy("other")])
    lab.streams[0].end()
    await trio.sleep(MAX_SECONDS)
    assert len(lab.store.workloads) == len(lab.store.services) == 0
    assert [policy.name for policy in lab.store.policies.all()] == ["other"]


async def test_a_missing_trust_root_is_tried_again_without_a_hot_loop(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    error = CallError("trust root: no such file", status=LOCAL)
    lab.refuse = lambda: error if len(lab.opened_at) <= 20 else None
    nursery.start_soon(lab.client.run)
    await trio.sleep(20 * MAX_SECONDS)
    assert lab.ready == 1
    assert lab.opened_at[20] - lab.opened_at[0] > MAX_SECONDS
    assert lab.count('istio_xds_connection_terminations_total{reason="Error"}') == 20


async def test_a_server_that_says_no_at_once_never_connected(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    no = CallError("no", status="UNAUTHENTICATED")

    class Refusing(FakeStream):
        def send(self, *pieces: bytes) -> None:
            self.requests.append(b"".join(pieces))

        async def receive(self) -> bytes | None:
            await trio.lowlevel.checkpoint()
            raise no

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeStream]:
        await trio.lowlevel.checkpoint()
        lab.opened_at.append(trio.current_time())
        yield Refusing(MESH)

    lab.client._connect = connect
    nursery.start_soon(lab.client.run)
    await trio.sleep(60)
    assert 6 < len(lab.opened_at) < 30
    ended = lab.count('istio_xds_connection_terminations_total{reason="ConnectionError"}')
    assert ended == pytest.approx(len(lab.opened_at), abs=1)


async def test_nonsense_ends_the_stream_but_not_the_client(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    lab.streams[0].deliver(b"\xff\xff\xff")
    await trio.sleep(MAX_SECONDS)
    assert len(lab.streams) == 2
    assert lab.count('istio_xds_connection_terminations_total{reason="Error"}') == 1


async def test_a_large_response_lets_others_in_between_whole_slices(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    key = "shop/cart.shop.svc.cluster.local"
    lab.snapshot = Snapshot(
        a_workload(f"w-{i}", ips=[f"10.1.{i // 250}.{i % 250}"], services={key: {80: 8080}})
        for i in range(1000)
    )
    seen: list[int] = []

    async def watch() -> None:
        while len(lab.store.workloads) < 1000:
            seen.append(len(lab.store.workloads))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(watch)
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    whole, step = RESOURCES_PER_RESPONSE, RESOURCES_PER_STEP[ADDRESS_TYPE]
    assert all(count % whole % step == 0 for count in seen)
    assert len(set(seen)) > 1000 / step / 2


async def test_many_policies_change_at_once_but_let_others_in_before_it(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab, count, seen = Lab(), 10 * STAGED_PER_STEP, [0]
    there = [a_policy(f"p-{i}", scope=PolicyScope.NAMESPACE) for i in range(count)]
    lab.snapshot = Snapshot(there)
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()

    async def watch() -> None:
        while seen[-1] < count:
            seen.append(sum(policy.dry_run for policy in lab.store.policies.all()))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(watch)
    lab.streams[0].push(Snapshot(replace(policy, dry_run=True) for policy in there))
    await wait_all_tasks_blocked()
    assert set(seen) == {0, count}
    reading = count // RESOURCES_PER_STEP[AUTHORIZATION_TYPE]
    assert len(seen) > reading + 2 * (count // STAGED_PER_STEP)


async def test_large_responses_are_kept_from_the_collector_and_small_ones_are_not(
    autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "FREEZE_RESOURCES", 200)
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    try:
        gc.unfreeze()  # the program itself
        for number in range(20):
            lab.streams[0].push(Snapshot(a_workload(f"{number}-{i}") for i in range(10)))
            await wait_all_tasks_blocked()
        assert gc.get_freeze_count() == 0
        lab.streams[0].push(Snapshot(a_workload(f"w-{i}") for i in range(250)))
        await wait_all_tasks_blocked()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


async def test_the_program_itself_is_out_of_the_collectors_sight_before_the_first_sync(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    gc.unfreeze()
    try:
        nursery.start_soon(lab.client.run)
        await wait_all_tasks_blocked()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


async def test_an_address_is_fetched_on_demand_by_its_alias(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab(on_demand=True)
    assert lab.demand is not None
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    assert lab.ready == 1
    assert len(lab.store.workloads) == 0
    assert await lab.demand.fetch("/192.0.2.10") is Answer.KNOWN
    assert list(lab.store.workloads.all()) == [CART]
    assert await lab.demand.fetch("/192.0.2.99") is Answer.ABSENT


async def test_a_question_asked_while_away_is_answered_on_the_next_stream(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab(on_demand=True)
    assert lab.demand is not None
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    lab.streams[0].end(CallError("gone", status="UNAVAILABLE"))
    await wait_all_tasks_blocked()
    assert await lab.demand.fetch("/192.0.2.10") is Answer.KNOWN
    assert len(lab.streams) == 2


async def test_what_did_not_exist_is_asked_for_again_after_a_while(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab(on_demand=True)
    assert lab.demand is not None
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    lab.streams[0].snapshot = Snapshot()
    assert await lab.demand.fetch("/192.0.2.10") is Answer.ABSENT
    lab.streams[0].snapshot = MESH
    assert await lab.demand.fetch("/192.0.2.10") is Answer.ABSENT
    await trio.sleep(ABSENT_SECONDS)
    assert await lab.demand.fetch("/192.0.2.10") is Answer.KNOWN


async def test_an_unknown_value_is_no_reason_to_refuse_a_workload(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lab = Lab()
    nursery.start_soon(lab.client.run)
    await wait_all_tasks_blocked()
    odd = pb.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="n")
    resource = odd.resources.add(name="odd")
    resource.resource.type_url = ADDRESS_TYPE
    resource.resource.value = b"\x0a\x08\xa2\x01\x03odd\x28\x09"  # a tunnel protocol numbered 9
    lab.streams[0].deliver(odd.SerializeToString())
    await wait_all_tasks_blocked()
    assert {w.uid for w in lab.store.workloads.all()} == {CART.uid, "odd"}
    assert lab.streams[0].server.refusals == []


def test_a_removed_name_may_be_a_workload_or_a_service_and_a_policys_is_nothing_else() -> None:
    update = as_update(Arrived(ADDRESS_TYPE, [CART], ["shop/cart", "lab//Pod/a/b", "bare"]))
    assert list(update.workloads) == [CART]
    assert list(update.removed_services) == ["shop/cart"]
    assert list(update.removed_workloads) == ["shop/cart", "lab//Pod/a/b", "bare"]
    update = as_update(Arrived(AUTHORIZATION_TYPE, [a_policy()], ["shop/old"]))
    assert list(update.policies) == [a_policy()]
    assert list(update.removed_policies) == ["shop/old"]
    assert not update.removed_workloads
    assert not update.removed_services
