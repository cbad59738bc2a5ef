"""The reference's own micro-benchmarks, with our code (dataplane.md 13.2): `python -m perf.units`.

Their names and sizes are the reference's; they run in one process and in memory. Figures are
microseconds of one step, the best of three goes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import msgspec

from perf.curves import NOWHERE, a_service, a_workload, timed
from ztunnel.decide.balance import Purpose, pick
from ztunnel.model.network import NetworkCidr, Port
from ztunnel.model.service import BalanceMode, LoadBalancer, Scope, Service
from ztunnel.model.workload import Locality, ServiceKey, Workload
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.traffic import Labels, Party, Reporter

PORT, TARGET_PORT = Port(80), Port(8080)
LOCALITY = Locality("region", "zone", "subzone")
FAILOVER = (Scope.NETWORK, Scope.REGION, Scope.ZONE, Scope.SUBZONE)
MISSED = IPv4Address("192.0.2.1")
CIDRS_FROM = int(IPv4Address("20.0.0.0"))
BALANCED = (10, 1000, 10_000)
MATCHED = (1, 10, 100, 1000, 10_000)
INSERTED = (250, 1000, 4000)
CHURNED = 1000
REPEATS = 2000
Found = dict[str, dict[int, float]]


def measure() -> Found:
    """Run all of them: name -> size -> microseconds. Where one has no size, it is 1."""
    found: Found = {"metrics/write": {1: metrics_write()}, "metrics/encode": {1: metrics_encode()}}
    found["xds/insert-remove"] = {CHURNED: insert_remove()}
    for name, scopes in (("basic", ()), ("locality", FAILOVER)):
        found[f"load_balance/{name}"] = {size: load_balance(size, scopes) for size in BALANCED}
    for kind in ("exact", "cidr"):
        for hits in (False, True):
            name = f"vip_match/{kind}-{'hit' if hits else 'miss'}"
            found[name] = {size: vip_match(size, kind, hits=hits) for size in MATCHED}
    for kind, inserts in INSERTS.items():
        found[f"endpoint_insert/{kind}"] = {size: inserts(size) for size in INSERTED}
    return found


def metrics_write() -> float:
    """Label a connection anew, and count it."""
    metrics = Metrics()

    def write(number: int) -> None:
        party = Party(workload=f"workload-{number % 100}", namespace="shop")
        traffic = metrics.traffic.traffic(Labels(Reporter.SOURCE, party, party))
        traffic.opened()
        traffic.closed()

    return timed(write, REPEATS)


def metrics_encode() -> float:
    """Print all metrics while there are a hundred label sets."""
    metrics = Metrics()
    for number in range(100):
        party = Party(workload=f"workload-{number}", namespace="shop")
        metrics.traffic.traffic(Labels(Reporter.SOURCE, party, party)).opened()
    return timed(lambda _: "".join(metrics.text()), 20)


def insert_remove() -> float:
    """Insert a thousand workloads of one service one by one, and remove them."""
    fresh = list(members(CHURNED, lambda _: 0))

    def churn(_: int) -> None:
        store = Store(node="node-0")
        store.apply(Update(services=[a_service(0)]))
        for one in fresh:
            store.apply(Update(workloads=[one]))
        for one in fresh:
            store.apply(Update(removed_workloads=[one.uid]))

    return timed(churn, 1) / CHURNED


def load_balance(size: int, scopes: tuple[Scope, ...]) -> float:
    """Pick one of a service's endpoints."""
    service = a_service(0)
    if scopes:
        balancer = LoadBalancer(mode=BalanceMode.FAILOVER, routing_preferences=scopes)
        service = msgspec.structs.replace(service, load_balancer=balancer)
    store, rng = Store(node="node-0"), random.Random(1)
    endpoints = list(members(size, lambda _: 0))
    store.apply(Update(services=[service], workloads=endpoints))

    def ask(_: int) -> None:
        assert pick(
            store.services, service, PORT, source=endpoints[0], purpose=Purpose.STANDARD, rng=rng
        )

    return timed(ask, REPEATS)


def vip_match(size: int, kind: str, *, hits: bool) -> float:
    """Find a service by an address, exactly or by a range."""
    services = [a_service(number) for number in range(size)]
    if kind == "cidr":
        services = [with_range(service, number) for number, service in enumerate(services)]
    store = Store(node="node-0")
    store.apply(Update(services=services))
    wanted = services[size // 2]
    ip = wanted.vips[0].ip if kind == "exact" else IPv4Address(CIDRS_FROM + size // 2 * 256 + 7)

    def ask(_: int) -> None:
        assert (store.services.by_vip(NOWHERE, ip if hits else MISSED) is not None) is hits

    return timed(ask, REPEATS)


def with_range(service: Service, number: int) -> Service:
    """Give a service a range of addresses instead of one."""
    cidr = ip_network((CIDRS_FROM + number * 256, 24))
    return msgspec.structs.replace(service, vips=(), cidr_vips=(NetworkCidr(NOWHERE, cidr),))


def members(size: int, service_of: Callable[[int], int | None]) -> Iterable[Workload]:
    """Make workloads of the services of these numbers."""
    for number in range(size):
        service = service_of(number)
        names = {} if service is None else {ServiceKey(a_service(service).key): {PORT: TARGET_PORT}}
        yield msgspec.structs.replace(a_workload(number), locality=LOCALITY, services=names)


def one_by_one(service_of: Callable[[int], int | None]) -> Callable[[int], float]:
    """Apply a push for each workload."""

    def insert(size: int) -> float:
        fresh = list(members(size, service_of))

        def push(_: int) -> None:
            store = Store(node="node-0")
            for one in fresh:
                store.apply(Update(workloads=[one]))

        return timed(push, 1) / size

    return insert


def batched(size: int) -> float:
    """Apply all in one push."""
    fresh = list(members(size, lambda _: 0))
    return timed(lambda _: Store(node="node-0").apply(Update(workloads=fresh)), 1) / size


INSERTS: dict[str, Callable[[int], float]] = {
    "shared-service": one_by_one(lambda _: 0),
    "distinct-service": one_by_one(lambda number: number),
    "no-service": one_by_one(lambda _: None),
    "batched-service": batched,
}


def in_a_process() -> Found:
    """Measure in a process that has done nothing else."""
    words = [sys.executable, "-m", "perf.units", "json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root)
    return {
        name: {int(size): value for size, value in sizes.items()}
        for name, sizes in json.loads(done.stdout).items()
    }


def main() -> None:
    if "json" in sys.argv:
        print(json.dumps(measure()))
        return
    for name, sizes in measure().items():
        shown = ", ".join(f"{size}: {value:.2f}" for size, value in sizes.items())
        print(f"{name:32} us  {shown}")


if __name__ == "__main__":
    main()
