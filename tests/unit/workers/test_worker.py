"""A worker in this process, told what to do over a real link; it binds no port."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.support.builders import a_policy, a_workload, an_identity
from tests.support.certs import AUTHORITY
from tests.support.worker_peers import Script, a_script
from ztunnel.config import Config
from ztunnel.errors import ConfigError, PeerError
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.proxy.workload_proxy import WorkloadProxy
from ztunnel.state.store import Update
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import PIPELINE
from ztunnel.tls.crl import parse_lists
from ztunnel.transport.sockets import local_pair
from ztunnel.wire.zds import PodInfo
from ztunnel.workers import worker as module
from ztunnel.workers.messages import (
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
    decode_answer,
)
from ztunnel.workers.worker import Worker, run_worker

CART = PodUid("cart")
INFO = PodInfo("cart", Namespace("shop"), ServiceAccount("cart"))
CONFIG = Config(dns_enabled=False, original_source=False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    usual = str(PIPELINE.filter)
    yield
    PIPELINE.set_up(usual, json=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers that come into being."""
    workers: list[Worker] = []

    class Noted(Worker):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            workers.append(self)

    monkeypatch.setattr(module, "Worker", Noted)
    return workers


@asynccontextmanager
async def a_worker(config: Config = CONFIG) -> AsyncIterator[Script]:
    ours, theirs = local_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_worker, theirs)
        async with a_script(ours, decode_answer) as control:
            control.order(Begin(config, 1, "error"))
            await control.next(Ready)
            yield control
        # The link is closed: the worker ends by itself, or this waits for ever.


@asynccontextmanager
async def a_broken_start(*orders: Order, config: Config = CONFIG) -> AsyncIterator[None]:
    ours, theirs = local_pair()
    async with trio.open_nursery() as nursery, a_script(ours, decode_answer) as control:
        control.order(Begin(config, 1, "error"))
        for order in orders:
            control.order(order)
        await run_worker(theirs)
        nursery.cancel_scope.cancel()
    yield


async def test_it_holds_the_state_it_is_told(made: list[Worker]) -> None:
    async with a_worker() as control:
        pod, policy = a_workload(), a_policy()
        control.order(Apply(Update(workloads=[pod], policies=[policy])))
        control.order(Ping(1))
        assert await control.next(Done) == Done(1)
        (worker,) = made
        assert list(worker.store.workloads.all()) == [pod]
        assert list(worker.store.policies.all()) == [policy]


async def test_it_asks_for_certificates_and_uses_what_it_is_handed(made: list[Worker]) -> None:
    who = an_identity()
    async with a_worker() as control, trio.open_nursery() as nursery:
        nursery.start_soon(made[0].certificates.certificate_for, who)
        assert await control.next(Wants) == Wants(str(who))
        issued = AUTHORITY.issue(who)
        control.order(Certified(who, issued))
        with trio.fail_after(5):
            certificate = await made[0].certificates.certificate_for(who)
        assert certificate.serial == issued.serial
        context = made[0].contexts.server(certificate)
        control.order(Certified(who, None))
        control.order(Ping(1))
        await control.next(Done)
        assert made[0].contexts.server(certificate) is not context


async def test_it_asks_for_addresses_where_they_come_on_demand(made: list[Worker]) -> None:
    async with a_worker(replace(CONFIG, xds_on_demand=True)) as control:
        demand = made[0].node.demand
        assert demand is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(demand.fetch, "/10.0.0.1")
            asked = await control.next(Asks)
            assert asked.what == "/10.0.0.1"
            control.order(Learned(asked.turn, "known"))
    async with a_worker():
        assert made[1].node.demand is None


async def test_it_serves_pods_and_leaves_them(
    monkeypatch: pytest.MonkeyPatch, made: list[Worker]
) -> None:
    problems = ["port 15001 is taken"]

    def start(_: WorkloadProxy) -> None:
        if problems:
            raise ConfigError(problems.pop())

    monkeypatch.setattr(WorkloadProxy, "start", start)
    async with a_worker() as control:
        fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        control.order(Serve(1, CART, INFO), fd)
        assert await control.next(Done) == Done(1, "port 15001 is taken")
        control.order(Serve(2, CART, INFO), fd)
        os.close(fd)
        assert await control.next(Done) == Done(2)
        (served,) = made[0].pods.pods.values()
        assert served.info == INFO
        control.order(Leave(3, CART))
        assert await control.next(Done) == Done(3)
        assert not made[0].pods.pods


async def test_it_shows_metrics_and_connections(
    monkeypatch: pytest.MonkeyPatch, made: list[Worker]
) -> None:
    monkeypatch.setattr(WorkloadProxy, "start", lambda _: None)
    monkeypatch.setattr(module, "connection_to_dict", lambda one: {"src": one})
    monkeypatch.setattr(module, "CONNECTIONS_PER_PIECE", 2)
    async with a_worker() as control:
        fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        control.order(Serve(1, CART, INFO), fd)
        os.close(fd)
        await control.next(Done)
        live = made[0].pods.pods[CART].proxy.context.live
        live.inbound |= {"a": None, "b": None, "c": None}  # type: ignore[dict-item]
        control.order(ShowConnections(2))
        assert await control.next(Connected) == Connected(2, CART, [{"src": "a"}, {"src": "b"}], [])
        assert await control.next(Connected) == Connected(2, CART, [{"src": "c"}], [])
        assert await control.next(Done) == Done(2)
        live.inbound.clear()
        control.order(ShowMetrics(3))
        assert "istio_build" in (await control.next(Metered)).text
        assert await control.next(Done) == Done(3)
        control.order(Drain(4, 1.0))
        assert await control.next(Done) == Done(4)


async def test_it_takes_revocation_lists_and_log_levels(made: list[Worker], tmp_path: Path) -> None:
    revoked = AUTHORITY.issue(an_identity())
    (one,) = parse_lists(AUTHORITY.revoke(revoked.serial, 1, 2))
    async with a_worker(replace(CONFIG, crl_path=tmp_path / "unread")) as control:
        control.order(Lists((one.der(),)))
        control.order(Levels("warn"))
        control.order(Ping(1))
        await control.next(Done)
        revocations = made[0].node.tls.revocations
        assert revocations is not None
        assert revocations.in_force() == (one.der(),)
        assert PIPELINE.filter.level_for("access") is Level.WARN


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (Begin(CONFIG, 1, "error"), "a second time"),
        (Serve(1, CART, INFO), "without its namespace"),
        (Lists(()), "without CRL_PATH"),
    ],
)
async def test_what_makes_no_sense_ends_it(order: Order, complaint: str) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(PeerError, match=complaint), flatten_subgroups=True, allow_unwrapped=True
    ):
        async with a_broken_start(order):
            pass


async def test_the_first_order_is_to_begin() -> None:
    ours, theirs = local_pair()
    async with a_script(ours, decode_answer) as control:
        control.order(Ping(1))
        with pytest.RaisesGroup(
            pytest.RaisesExc(PeerError, match="the first order is Ping"), flatten_subgroups=True
        ):
            await run_worker(theirs)
