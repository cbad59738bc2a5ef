"""What one more of something costs when there are many already: `python -m perf.curves`.

Everything is in one process and in memory: the store and the decisions, without sockets. Flat means
that the cost does not grow with how many there are. Each size has a process of its own, so that
memory is that size's alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

from perf.processes import private_kib
from ztunnel.decide.authorize import Permit, authorize
from ztunnel.decide.route import Hop, OutboundRequest, route
from ztunnel.model.flow import Flow
from ztunnel.model.identity import Identity, Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Endpoint, Network, NetworkAddress, Port
from ztunnel.model.policy import Action, Match, MatchKind, Policy, PolicyScope, StringMatch
from ztunnel.model.service import Service
from ztunnel.model.workload import ServiceKey, TunnelProtocol, Workload, WorkloadUid
from ztunnel.state.store import Store, Update

SIZES = (1, 10, 100, 1000, 10_000, 100_000)
ENDPOINTS_EACH = 20  # of a service, as many as the deployments that a large mesh consists of
PODS_FROM = int(IPv4Address("10.0.0.0"))
VIPS_FROM = int(IPv4Address("172.16.0.0"))
SHOP = Namespace("shop")
NOWHERE = Network("")
REPEATS = 2000
APPLIED = 200
Point = dict[str, float]
UNITS = {
    "add_workload_us": "us to apply one more workload",
    "add_policy_us": "us to apply one more policy",
    "route_pod_us": "us to route to a pod",
    "route_service_us": "us to route to a service",
    "authorize_us": "us to judge a connection under that many policies",
    "kib_per_workload": "KiB for each workload known",
}


def a_workload(number: int) -> Workload:
    service = f"{SHOP}/service-{number // ENDPOINTS_EACH}.shop.svc.cluster.local"
    return Workload(
        uid=WorkloadUid(f"cluster//Pod/shop/pod-{number}"),
        name=f"pod-{number}",
        namespace=SHOP,
        trust_domain=TrustDomain("cluster.local"),
        service_account=ServiceAccount(f"account-{number // ENDPOINTS_EACH}"),
        ips=(IPv4Address(PODS_FROM + number),),
        protocol=TunnelProtocol.HBONE,
        node=f"node-{number % 100}",
        services={ServiceKey(service): {Port(80): Port(8080)}},
    )


def a_service(number: int) -> Service:
    return Service(
        name=f"service-{number}",
        namespace=SHOP,
        hostname=f"service-{number}.shop.svc.cluster.local",
        vips=(NetworkAddress(NOWHERE, IPv4Address(VIPS_FROM + number)),),
        ports={Port(80): Port(8080)},
    )


def a_policy(number: int) -> Policy:
    rules = tuple(
        (
            (
                Match(
                    principals=(
                        StringMatch(MatchKind.EXACT, f"cluster.local/ns/x/sa/{number}-{n}"),
                    )
                ),
            ),
        )
        for n in range(10)
    )
    return Policy(
        name=f"deny-{number}",
        namespace=SHOP,
        scope=PolicyScope.NAMESPACE,
        action=Action.DENY,
        rules=rules,
    )


def timed(action: Callable[[int], object], repeats: int) -> float:
    """Give the microseconds of one call, as the best of three goes."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for number in range(repeats):
            action(number)
        best = min(best, time.perf_counter() - began)
    return best / repeats * 1e6


def measure(size: int) -> Point:
    """Measure everything with `size` workloads, and with as many policies."""
    store, rng = Store(node="node-0"), random.Random(1)
    before = private_kib(os.getpid())
    services = [a_service(n) for n in range(-(-size // ENDPOINTS_EACH))]
    store.apply(Update(services=services, workloads=[a_workload(n) for n in range(size)]))
    kib = (private_kib(os.getpid()) - before) / size
    client = store.workloads.by_uid(a_workload(0).uid)
    assert client is not None
    pods = [Endpoint(IPv4Address(PODS_FROM + rng.randrange(size)), Port(8080)) for _ in range(64)]
    vips = [
        Endpoint(IPv4Address(VIPS_FROM + rng.randrange(len(services))), Port(80)) for _ in range(64)
    ]

    def routed(targets: list[Endpoint]) -> Callable[[int], object]:
        def ask(number: int) -> None:
            request = OutboundRequest(
                source=client, source_ip=client.ips[0], target=targets[number % 64]
            )
            assert isinstance(route(request, store, network=NOWHERE, rng=rng), Hop)

        return ask

    def churn(number: int) -> None:
        fresh = a_workload(size + number)
        store.apply(Update(workloads=[fresh]))
        store.apply(Update(removed_workloads=[fresh.uid]))

    point = {
        "route_pod_us": timed(routed(pods), REPEATS),
        "route_service_us": timed(routed(vips), REPEATS),
        "add_workload_us": timed(churn, APPLIED) / 2,
        "kib_per_workload": kib,
    }
    return point | policies(store, client, size)


def policies(store: Store, client: Workload, size: int) -> Point:
    """Measure what depends on the number of policies; no more than a mesh can have."""
    count = min(size, 10_000)
    store.apply(Update(policies=[a_policy(n) for n in range(count)]))
    flow = Flow(
        source=Identity(client.trust_domain, SHOP, client.service_account),
        source_endpoint=Endpoint(client.ips[0], Port(40000)),
        destination=Endpoint(IPv4Address(PODS_FROM), Port(8080)),
    )

    def judge(_: int) -> None:
        assert isinstance(authorize(flow, store.policies.for_workload(client)), Permit)

    def churn(number: int) -> None:
        fresh = a_policy(count + number)
        store.apply(Update(policies=[fresh]))
        store.apply(Update(removed_policies=[fresh.key]))

    return {"authorize_us": timed(judge, REPEATS), "add_policy_us": timed(churn, APPLIED) / 2}


def curves(sizes: tuple[int, ...] = SIZES) -> dict[int, Point]:
    """Measure every size, each in a fresh process."""
    found = {}
    for size in sizes:
        words = [sys.executable, "-m", "perf.curves", str(size)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        found[size] = json.loads(done.stdout)
    return found


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    found = curves()
    for key, unit in UNITS.items():
        print(f"{unit:50}", *(f"{size}: {point[key]:.2f}" for size, point in found.items()))


if __name__ == "__main__":
    main()
