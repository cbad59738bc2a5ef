"""What a mesh costs when it arrives, changes and goes, over the real gRPC stream.

    python -m perf.xds [workloads] [services] [policies] [whole]

With `whole` all addresses come in one message, as from istiod; else in many, as from our own.
The control plane is a process of its own. CPU is this process's, less what measuring costs while
nothing happens. A turn is how long one task kept the loop, by the thread's CPU time and, in
brackets, by the clock. A stall is how late a task is that wants to run every millisecond, so it is
what a connection would feel: on a busy machine both have in them what other processes took.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ztunnel.devmesh.control_plane import ControlPlane

from ztunnel.config import Config
from ztunnel.decide.balance import Purpose, pick
from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Network, NetworkAddress, Port
from ztunnel.model.policy import Action, Match, Policy, PolicyScope, ServiceAccountMatch
from ztunnel.model.service import Service
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.model.workload import (
    Health,
    Locality,
    PolicyKey,
    ServiceKey,
    TunnelProtocol,
    Workload,
    WorkloadUid,
)
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics
from ztunnel.wire import delta_server
from ztunnel.wire.resources import ADDRESS_TYPE, Resource
from ztunnel.xds.client import xds_client

SIZES = (100_000, 5_000, 1_000)  # workloads, services, policies
STALL_SECONDS = 0.005
NODES = 500
PODS_FROM = int(IPv4Address("11.0.0.0"))  # none that the bench's own pods have
NAMESPACES = 200
CHURNS = 100
CHURNS_PER_SECOND = 50
PICKS_PER_SECOND = 1000
BIG_SERVICE_ENDPOINTS = 5000
CHANGE_SECONDS = 300


def namespace(number: int) -> Namespace:
    return Namespace(f"namespace-{number % NAMESPACES}")


def service_name(number: int) -> str:
    return f"service-{number}.{namespace(number)}.svc.cluster.local"


def a_workload(number: int, services: int, *, is_healthy: bool = True) -> Workload:
    # The first endpoints all belong to service 0, the others are spread evenly.
    service = 0 if number < BIG_SERVICE_ENDPOINTS else number % services
    where = namespace(service)
    return Workload(
        uid=WorkloadUid(f"Kubernetes//Pod/{where}/pod-{number}-5d8f7c9b6d-x{number % 97}"),
        name=f"pod-{number}-5d8f7c9b6d-x{number % 97}",
        namespace=where,
        trust_domain=TrustDomain("cluster.local"),
        service_account=ServiceAccount(f"account-{service % 50}"),
        ips=(IPv4Address(PODS_FROM + number),),
        protocol=TunnelProtocol.HBONE,
        workload_name=f"deployment-{service}",
        workload_type="pod",
        canonical_name=f"deployment-{service}",
        canonical_revision="latest",
        node=f"node-{number % NODES}",
        cluster_id="Kubernetes",
        locality=Locality("region-1", f"zone-{number % 3}", ""),
        health=Health.HEALTHY if is_healthy else Health.UNHEALTHY,
        policies=(PolicyKey("istio-system/istio_converted_static_strict"),),
        services={
            ServiceKey(f"{where}/{service_name(service)}"): {
                Port(80): Port(8080),
                Port(443): Port(8443),
            }
        },
    )


def a_service(number: int) -> Service:
    return Service(
        name=f"service-{number}",
        namespace=namespace(number),
        hostname=service_name(number),
        vips=(NetworkAddress(Network(""), IPv4Address(0xAC100000 + number)),),
        ports={Port(80): Port(8080), Port(443): Port(8443)},
        canonical=True,
    )


def a_policy(number: int, action: Action = Action.ALLOW) -> Policy:
    accounts = tuple(
        ServiceAccountMatch(namespace(number + i), ServiceAccount(f"account-{i}")) for i in range(5)
    )
    return Policy(
        name=f"policy-{number}",
        namespace=namespace(number),
        scope=PolicyScope.NAMESPACE,
        action=action,
        rules=(((Match(service_accounts=accounts),),),),
    )


def a_mesh(workloads: int, services: int, policies: int) -> Iterator[Resource]:
    yield from (a_workload(number, services) for number in range(workloads))
    yield from (a_service(number) for number in range(services))
    yield from (a_policy(number) for number in range(policies))


def serve(workloads: int, services: int, policies: int) -> None:
    """Be the control plane: do what the lines on standard input say."""
    # Not loaded at the top: a proxy has no control plane in its memory.
    from ztunnel.devmesh.control_plane import ControlPlane  # noqa: PLC0415
    from ztunnel.identity.dev_ca import DevelopmentCa  # noqa: PLC0415

    authority = DevelopmentCa.create()
    plane = ControlPlane(authority)
    mesh = list(a_mesh(workloads, services, policies))
    plane.publish(mesh)
    gc.freeze()
    print(json.dumps({"port": plane.start(), "roots": authority.roots_pem.decode()}), flush=True)
    is_healthy = False
    for line in sys.stdin:
        if line == "disconnect\n":
            plane.disconnect()
        elif line == "churn\n":
            churn(plane, services, is_healthy=is_healthy)
            is_healthy = not is_healthy
        elif line == "policies\n":
            mesh[-policies:] = [a_policy(number, Action.DENY) for number in range(policies)]
            plane.publish(mesh)
        elif line == "service\n":
            plane.publish(mesh[BIG_SERVICE_ENDPOINTS:workloads] + mesh[workloads + 1 :])
        elif line == "back\n":
            plane.publish(mesh)
        elif line == "away\n":
            plane.stop()
            plane.publish(mesh[: workloads // 20])
            plane.start(f"127.0.0.1:{plane.port}")
    plane.stop()


def churn(plane: ControlPlane, services: int, *, is_healthy: bool) -> None:
    """Let one endpoint of the large service after the other go, or come back."""
    begun = time.monotonic()
    for number in range(CHURNS):
        plane.publish_one(a_workload(number, services, is_healthy=is_healthy))
        time.sleep(max(0.0, begun + number / CHURNS_PER_SECOND - time.monotonic()))


class Stalls(trio.abc.Instrument):
    """How long the loop did not come round, and why."""

    def __init__(self) -> None:
        self.idle_cpu = 0.0  # seconds of CPU per second, for measuring alone
        self._begun = self._seen = 0.0
        self._reset()

    def _reset(self) -> None:
        self._worst_stall = self._worst_turn = self._slowest_turn = 0.0
        self._late = self._long = 0
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await trio.sleep(0.001)
            late = time.perf_counter() - before - 0.001
            self._worst_stall = max(self._worst_stall, late)
            self._late += late > STALL_SECONDS

    async def calibrate(self) -> None:
        self._reset()
        await trio.sleep(1)
        self.idle_cpu = time.process_time() - self._cpu
        self._reset()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._seen, self._begun = time.perf_counter(), time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        turn = time.thread_time() - self._begun
        self._worst_turn = max(self._worst_turn, turn)
        self._slowest_turn = max(self._slowest_turn, time.perf_counter() - self._seen)
        self._long += turn > STALL_SECONDS

    def take(self) -> tuple[float, float, str]:
        """Return CPU and wall seconds since the last time, and the rest as a text."""
        wall = time.perf_counter() - self._wall
        cpu = max(0.0, time.process_time() - self._cpu - wall * self.idle_cpu)
        text = (
            f"longest turn {self._worst_turn * 1000:.1f} ms "
            f"[{self._slowest_turn * 1000:.1f}] ({self._long} over 5), "
            f"worst stall {self._worst_stall * 1000:.1f} ms ({self._late} over 5)"
        )
        self._reset()
        return cpu, wall, text


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 nothing in the store is an event
        await trio.sleep(0.01)


async def measure(child: subprocess.Popen[str], sizes: tuple[int, int, int]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    said = json.loads(child.stdout.readline())
    config = Config(
        xds_address=ServerUrl("localhost", said["port"]),
        xds_root=Source(SourceKind.LITERAL, said["roots"]),
        node_name="node-0",
    )
    store, metrics, stalls = Store(node="node-0"), Metrics(), Stalls()
    messages = metrics.xds_messages.count(ADDRESS_TYPE)
    trio.lowlevel.add_instrument(stalls)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stalls.watch)
        gc.collect()  # of the program that was just loaded, which is no part of a sync
        await stalls.calibrate()
        print(f"before: {rss_mib():.0f} MiB")
        client = xds_client(config, store, metrics=metrics, rng=random.Random(1))
        await nursery.start(client.run)
        first, wall, text = stalls.take()
        assert (len(store.workloads), len(store.services), len(store.policies)) == sizes
        print(
            f"first sync: {wall:.2f} s, {first:.2f} s CPU "
            f"({first / sum(sizes) * 1e6:.1f} us each), {text}, {rss_mib():.0f} MiB"
        )
        seen = messages.value
        child.stdin.write("disconnect\n")
        child.stdin.flush()
        await until(lambda: messages.value > seen)
        again, _, text = stalls.take()
        print(f"reconnect: {again:.3f} s CPU ({again / first:.1%} of the first), {text}")
        for picks_per_second in (0, PICKS_PER_SECOND):
            await measure_churn(child, store, stalls, picks_per_second)
        for order, what, is_done in changes_of(store, sizes):
            await measure_change(child, stalls, order, what, is_done)
        print(f"after: {rss_mib():.0f} MiB")
        nursery.cancel_scope.cancel()


def changes_of(
    store: Store, sizes: tuple[int, int, int]
) -> Iterator[tuple[str, str, Callable[[], bool]]]:
    """Yield what else happens to a mesh: the order, its description, and how to see it is done."""
    workloads, services, policies = sizes

    def holds(*counts: int) -> bool:
        return (len(store.workloads), len(store.services), len(store.policies)) == counts

    yield (
        "policies",
        f"{policies} policies change",
        lambda: all(policy.action is Action.DENY for policy in store.policies.all()),
    )
    yield (
        "service",
        f"a service goes with {BIG_SERVICE_ENDPOINTS} endpoints",
        lambda: holds(workloads - BIG_SERVICE_ENDPOINTS, services - 1, policies),
    )
    yield "back", "and comes back", lambda: holds(*sizes)
    yield (
        "away",
        "reconnect to a mesh of which nearly all is gone",
        lambda: holds(workloads // 20, 0, 0),
    )


async def measure_change(
    child: subprocess.Popen[str],
    stalls: Stalls,
    order: str,
    what: str,
    is_done: Callable[[], bool],
) -> None:
    """Measure one change of very much."""
    assert child.stdin is not None
    stalls.take()
    child.stdin.write(f"{order}\n")
    child.stdin.flush()
    with trio.fail_after(CHANGE_SECONDS):
        await until(is_done)
    _, _, text = stalls.take()
    print(f"{what}: {text}")


async def measure_churn(
    child: subprocess.Popen[str], store: Store, stalls: Stalls, picks_per_second: int
) -> None:
    """Measure what changes of a large service cost, alone and under connections to it."""
    assert child.stdin is not None
    service = store.services.by_hostname(service_name(0))
    source = next(iter(store.workloads.all()))
    assert service is not None
    rng, picked = random.Random(1), 0
    stalls.take()
    begun, version = trio.current_time(), store.version
    child.stdin.write("churn\n")
    child.stdin.flush()
    with trio.fail_after(10 * CHURNS / CHURNS_PER_SECOND):
        while store.version < version + CHURNS:
            await trio.sleep(0.01)
            while picked < (trio.current_time() - begun) * picks_per_second:
                picked += 1
                pick(
                    store.services,
                    service,
                    Port(80),
                    source=source,
                    purpose=Purpose.STANDARD,
                    rng=rng,
                )
    cpu, wall, text = stalls.take()
    print(
        f"churn {CHURNS / wall:.0f}/s with {picked / wall:.0f} picks/s: "
        f"{cpu / wall:.1%} CPU, {cpu / CHURNS * 1000:.2f} ms a change, {text}"
    )


def main() -> None:
    arguments = [int(text) for text in sys.argv[1:] if text.isdigit()]
    workloads, services, policies = arguments or SIZES
    sizes = (workloads, services, policies)
    if "whole" in sys.argv:
        delta_server.RESOURCES_PER_RESPONSE = workloads + services
    if "serve" in sys.argv:
        serve(*sizes)
        return
    command = [sys.executable, "-m", "perf.xds", "serve", *sys.argv[1:]]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    ) as child:
        try:
            trio.run(measure, child, sizes)
        finally:
            child.kill()


if __name__ == "__main__":
    main()
