"""What a mesh costs when it arrives: first sync, reconnect and churn over the real gRPC stream.

    python -m perf.xds [workloads] [services] [policies]

The control plane is a process of its own. CPU is this process's, all threads. A stall is how late a
task is that wants to run every millisecond, so it is what a connection would feel.
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

import trio

from ztunnel.config import Config
from ztunnel.devmesh.control_plane import ControlPlane
from ztunnel.identity.dev_ca import DevelopmentCa
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
from ztunnel.wire.resources import ADDRESS_TYPE, Resource
from ztunnel.xds.client import xds_client

SIZES = (100_000, 5_000, 1_000)  # workloads, services, policies
STALL_SECONDS = 0.005
NODES = 500
NAMESPACES = 200
CHURNS = 100
CHURNS_PER_SECOND = 50
BIG_SERVICE_ENDPOINTS = 5000


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
        ips=(IPv4Address(0x0A000000 + number),),
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


def a_policy(number: int) -> Policy:
    accounts = tuple(
        ServiceAccountMatch(namespace(number + i), ServiceAccount(f"account-{i}")) for i in range(5)
    )
    return Policy(
        name=f"policy-{number}",
        namespace=namespace(number),
        scope=PolicyScope.NAMESPACE,
        action=Action.ALLOW,
        rules=(((Match(service_accounts=accounts),),),),
    )


def a_mesh(workloads: int, services: int, policies: int) -> Iterator[Resource]:
    yield from (a_workload(number, services) for number in range(workloads))
    yield from (a_service(number) for number in range(services))
    yield from (a_policy(number) for number in range(policies))


def serve(workloads: int, services: int, policies: int) -> None:
    """Be the control plane: do what the lines on standard input say."""
    authority = DevelopmentCa.create()
    plane = ControlPlane(authority)
    mesh = list(a_mesh(workloads, services, policies))
    plane.publish(mesh)
    gc.freeze()
    print(json.dumps({"port": plane.start(), "roots": authority.roots_pem.decode()}), flush=True)
    for line in sys.stdin:
        if line == "disconnect\n":
            plane.disconnect()
        elif line == "churn\n":
            churn(plane, services)
    plane.stop()


def churn(plane: ControlPlane, services: int) -> None:
    """Let one endpoint of the large service after the other go."""
    begun = time.monotonic()
    for number in range(CHURNS):
        plane.publish_one(a_workload(number, services, is_healthy=False))
        time.sleep(max(0.0, begun + number / CHURNS_PER_SECOND - time.monotonic()))


class Stalls:
    """How long the loop did not come round."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.over_5_ms = 0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await trio.sleep(0.001)
            late = time.perf_counter() - before - 0.001
            self.worst = max(self.worst, late)
            self.over_5_ms += late > STALL_SECONDS

    def take(self) -> str:
        text = f"worst stall {self.worst * 1000:.1f} ms, {self.over_5_ms} over 5 ms"
        self.worst, self.over_5_ms = 0.0, 0
        return text


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
    print(f"before: {rss_mib():.0f} MiB")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stalls.watch)
        await trio.sleep(0.1)
        stalls.take()
        begun, used = time.perf_counter(), time.process_time()
        client = xds_client(config, store, metrics=metrics, rng=random.Random(1))
        await nursery.start(client.run)
        first = time.process_time() - used
        assert (len(store.workloads), len(store.services), len(store.policies)) == sizes
        print(
            f"first sync: {time.perf_counter() - begun:.2f} s, {first:.2f} s CPU "
            f"({first / sum(sizes) * 1e6:.1f} us each), {stalls.take()}, {rss_mib():.0f} MiB"
        )
        used, seen = time.process_time(), messages.value
        child.stdin.write("disconnect\n")
        child.stdin.flush()
        await until(lambda: messages.value > seen)
        again = time.process_time() - used
        print(f"reconnect: {again:.3f} s CPU ({again / first:.1%} of the first), {stalls.take()}")
        used, version = time.process_time(), store.version
        child.stdin.write("churn\n")
        child.stdin.flush()
        with trio.fail_after(10 * CHURNS / CHURNS_PER_SECOND):
            await until(lambda: store.version >= version + CHURNS)
        each = (time.process_time() - used) / CHURNS
        print(f"churn: {each * 1000:.2f} ms CPU for each of {CHURNS}, {stalls.take()}")
        print(f"after: {rss_mib():.0f} MiB")
        nursery.cancel_scope.cancel()


def main() -> None:
    arguments = [int(text) for text in sys.argv[1:] if text.isdigit()]
    workloads, services, policies = arguments or SIZES
    sizes = (workloads, services, policies)
    if "serve" in sys.argv:
        serve(*sizes)
        return
    command = [sys.executable, "-m", "perf.xds", "serve", *(str(size) for size in sizes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    ) as child:
        try:
            trio.run(measure, child, sizes)
        finally:
            child.kill()


if __name__ == "__main__":
    main()
