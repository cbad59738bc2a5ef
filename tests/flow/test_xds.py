"""A store fed by the control plane over real gRPC and TLS, and what breaks on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.config import Config
from ztunnel.devmesh.control_plane import ControlPlane, follow
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE
from ztunnel.xds import backoff
from ztunnel.xds.client import xds_client
from ztunnel.xds.demand import Answer, Demand

AUTHORITY = DevelopmentCa.create()
SECONDS = 15.0
CART_ADDRESS = "/192.0.2.10"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Come back soon: these tests run on a real clock."""
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(backoff, "MAX_SECONDS", 0.2)


class Node:
    """What a node proxy has of the control plane."""

    def __init__(self, plane: ControlPlane, *, on_demand: bool = False) -> None:
        self.plane = plane
        self.store, self.metrics = Store(node="n1"), Metrics()
        self.demand = Demand(self.store, metrics=self.metrics) if on_demand else None
        self.config = Config(
            xds_address=ServerUrl("localhost", plane.port),
            xds_root=Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode()),
            node_name="n1",
        )

    def names(self) -> set[str]:
        return {workload.name for workload in self.store.workloads.all()}

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for the store to become as it should."""
        changed = trio.Event()

        def on_change(_: object) -> None:
            changed.set()

        stop = self.store.subscribe(on_change)
        try:
            while not is_so():
                await changed.wait()
                changed = trio.Event()
        finally:
            stop()

    async def until_counted(self, is_so: Callable[[], bool]) -> None:
        """Wait for the control plane to have seen something."""
        wait = partial(self.plane.wait_for, is_so, seconds=SECONDS)
        assert await trio.to_thread.run_sync(wait)


@asynccontextmanager
async def a_node(*, on_demand: bool = False) -> AsyncIterator[Node]:
    """Give a node in sync with a control plane of its own."""
    plane = ControlPlane(AUTHORITY)
    plane.publish([a_workload("cart-0"), a_service(vips=["10.0.0.1"]), a_policy()])
    plane.start()
    node = Node(plane, on_demand=on_demand)
    try:
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                client = xds_client(
                    node.config,
                    node.store,
                    metrics=node.metrics,
                    rng=Random(1),
                    demand=node.demand,
                )
                await nursery.start(client.run)
                yield node
                nursery.cancel_scope.cancel()
    finally:
        plane.stop()


async def test_start_returns_when_everything_is_here_and_changes_follow() -> None:
    async with a_node() as node:
        assert node.names() == {"cart-0"}
        assert (len(node.store.services), len(node.store.policies)) == (1, 1)
        node.plane.publish([a_workload("cart-1")])
        await node.until(lambda: node.names() == {"cart-1"} and not len(node.store.policies))
        assert node.plane.counts.refusals == []


async def test_the_state_outlives_the_control_plane_and_is_mended_when_it_comes_back() -> None:
    async with a_node() as node:
        port = node.plane.port
        await trio.to_thread.run_sync(node.plane.stop)
        assert node.names() == {"cart-0"}
        node.plane.publish([a_workload("cart-1"), a_policy("other")])
        assert node.plane.start(f"127.0.0.1:{port}") == port
        await node.until(lambda: node.names() == {"cart-1"})
        await node.until(lambda: [p.name for p in node.store.policies.all()] == ["other"])
        assert len(node.store.services) == 0


async def test_what_did_not_change_is_not_sent_again() -> None:
    async with a_node() as node:
        sample = f'istio_xds_message_bytes_total{{url="{ADDRESS_TYPE}"}} '
        before = [line for line in "".join(node.metrics.text()).splitlines() if sample in line]
        acks = node.plane.counts.acks
        node.plane.disconnect()
        await node.until_counted(lambda: node.plane.counts.acks >= acks + 2)
        after = [line for line in "".join(node.metrics.text()).splitlines() if sample in line]
        assert before == after != []


async def test_a_stale_control_plane_does_no_harm() -> None:
    async with a_node() as node:
        node.plane.be_stale(stale=True)
        node.plane.publish([a_workload("cart-1")])
        node.plane.disconnect()
        await node.until_counted(lambda: node.plane.counts.streams == 2)
        assert node.names() == {"cart-0"}
        node.plane.be_stale(stale=False)
        await node.until(lambda: node.names() == {"cart-1"})


async def test_a_bad_resource_is_refused_by_name_and_the_rest_goes_on() -> None:
    async with a_node() as node:
        bad = pb.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="x")
        resource = bad.resources.add(name="lab//Pod/shop/cart-0", version="worse")
        resource.resource.type_url = ADDRESS_TYPE
        resource.resource.value = b"\x0a\x09\xa2\x01\x01u\x1a\x03abc"
        node.plane.send_raw(bad.SerializeToString())
        await node.until_counted(lambda: bool(node.plane.counts.refusals))
        assert node.plane.counts.refusals == [
            "lab//Pod/shop/cart-0: workload.addresses: 3 bytes are not an IP address"
        ]
        assert node.names() == {"cart-0"}
        node.plane.publish([a_workload("cart-0"), a_workload("cart-1")])
        await node.until(lambda: node.names() == {"cart-0", "cart-1"})


async def test_garbage_costs_one_stream() -> None:
    async with a_node() as node:
        node.plane.send_raw(b"\xff\xff\xff\xff")
        await node.until_counted(lambda: node.plane.counts.streams == 2)
        assert node.names() == {"cart-0"}


async def test_addresses_are_fetched_on_demand_also_across_a_disconnect() -> None:
    async with a_node(on_demand=True) as node:
        assert node.demand is not None
        assert node.names() == set()
        answers: list[Answer] = []

        async def fetch(what: str) -> None:
            assert node.demand is not None
            answers.append(await node.demand.fetch(what))

        async with trio.open_nursery() as nursery:
            node.plane.disconnect()
            for _ in range(20):
                nursery.start_soon(fetch, CART_ADDRESS)
            nursery.start_soon(fetch, "/10.0.0.1")
        assert answers == [Answer.KNOWN] * 21
        assert await node.demand.fetch("/192.0.2.99") is Answer.ABSENT
        node.plane.publish([a_workload("cart-0", ips=["192.0.2.11"])])
        await node.until(lambda: len(node.store.services) == 0)


async def test_a_file_in_kubernetes_terms_reaches_the_store_as_it_is_edited(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    pod = "kind: Pod\nmetadata: {name: NAME, namespace: shop}\nstatus: {podIP: 192.0.2.10}\n"
    path.write_text(pod.replace("NAME", "one"))
    async with a_node() as node, trio.open_nursery() as nursery:
        nursery.start_soon(partial(follow, node.plane, path, poll_seconds=0.01))
        await node.until(lambda: node.names() == {"one"})
        path.write_text(pod.replace("NAME", "two"))
        await node.until(lambda: node.names() == {"two"})
        nursery.cancel_scope.cancel()
