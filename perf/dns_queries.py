"""How many DNS queries a pod gets answered, and how fast: `python -m perf.dns_queries`, as root.

Rows: dnsmasq asked directly by a pod that is not redirected, the same through our server in a pod
that is, and names of the mesh. Rows take turns in every round; a ratio is the median of the ratios
to the first row within each round. The load is `dns_load.py`; it, dnsmasq and we share the cores.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import trio

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import PROXY_MARK, RedirectPlan
from ztunnel.devmesh.cluster import Cluster, Pod
from ztunnel.dns.server import DnsServer, DnsSettings
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Endpoint, Network, NetworkAddress, Port, parse_ip
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload, WorkloadUid
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.metrics import Metrics
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory

RESOLVER = "198.51.100.53"
SERVICES = 1000
MESH_NAME = "svc7.shop.svc.cluster.local"
OTHER_NAME = "www.example.org"
LOAD = Path(__file__).with_name("dns_load.py")
START_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """A pod, and what it asks for."""

    title: str
    words: tuple[str, ...]
    is_ours: bool = True


DIRECT = Row("dnsmasq, asked directly", (OTHER_NAME,), is_ours=False)
ROWS = (
    DIRECT,
    Row("through us to dnsmasq", (OTHER_NAME,)),
    Row("through us, each query new", (OTHER_NAME, "--fresh")),
    Row("name of the mesh", (MESH_NAME,)),
    Row("name of the mesh, each query new", (MESH_NAME, "--fresh")),
)


class Client:
    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def workload(self) -> Workload:
        return self._workload

    async def known_workload(self) -> Workload:
        await trio.lowlevel.checkpoint()
        return self._workload


def a_store() -> Store:
    services = [
        Service(
            name=f"svc{number}",
            namespace=Namespace("shop"),
            hostname=f"svc{number}.shop.svc.cluster.local",
            vips=(NetworkAddress(Network(""), parse_ip(f"10.96.{number // 250}.{number % 250}")),),
            ports={Port(80): Port(8080)},
        )
        for number in range(SERVICES)
    ]
    store = Store()
    store.apply(Update(services=services))
    return store


async def asked(pod: Pod, *words: str) -> dict[str, float]:
    """Run the load in a pod; add what it cost us, in microseconds of CPU a query."""
    before = cpu_seconds()
    command = pod.command(sys.executable, "-P", str(LOAD), "--server", RESOLVER, *words)
    done = await trio.run_process(command, capture_stdout=True)
    found: dict[str, float] = json.loads(done.stdout)
    found["cpu_us"] = (cpu_seconds() - before) / max(1, found["answers"]) * 1e6
    return found


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def show(row: Row, rounds: list[dict[Row, dict[str, float]]]) -> None:
    def middle(key: str) -> float:
        return median(found[row][key] for found in rounds)

    rates = [found[row]["per_second"] / found[DIRECT]["per_second"] for found in rounds]
    missed = sum(found[row]["lost"] + found[row]["wrong"] for found in rounds)
    print(
        f"{row.title:34} {middle('per_second'):7.0f}/s  x {median(rates):.2f}"
        f" [{min(rates):.2f}..{max(rates):.2f}]  p50 {middle('p50_us'):5.0f} us"
        f"  p99 {middle('p99_us'):6.0f} us  our CPU {middle('cpu_us') * row.is_ours:4.1f} us"
        f"  not answered {missed:.0f}",
        flush=True,
    )


async def measure(options: argparse.Namespace) -> None:
    with Cluster() as cluster:
        node = cluster.add_node("node")
        bare = cluster.add_pod(node, "bare", "10.1.0.1")
        pod = cluster.add_pod(node, "pod", "10.1.0.2")
        resolver = cluster.add_outside("resolver", RESOLVER)
        program = resolver.popen(
            *("dnsmasq", "-k", "--no-resolv", "--no-hosts", "--user=root", "--pid-file"),
            *("--log-facility=/dev/null", f"--host-record={OTHER_NAME},192.0.2.1"),
        )  # fmt: skip
        try:
            await until_answered(bare)
            apply_redirect(pod.netns, RedirectPlan(dns=True))
            await measure_rows(pod, bare, options)
        finally:
            program.kill()
            program.wait()


async def until_answered(bare: Pod) -> None:
    """Wait for the resolver to start."""
    with trio.fail_after(START_SECONDS):
        while not (await asked(bare, OTHER_NAME, "--queries", "1"))["answers"]:
            pass


async def measure_rows(pod: Pod, bare: Pod, options: argparse.Namespace) -> None:
    reactor = Reactor()
    workload = Workload(uid=WorkloadUid("web"), name="web", namespace=Namespace("shop"))
    server = DnsServer(
        Client(workload),
        Namespace("shop"),
        sockets=SocketFactory(netns=pod.netns, mark=PROXY_MARK, keepalive=None),
        reactor=reactor,
        store=a_store(),
        metrics=Metrics(),
        settings=DnsSettings(addresses=(Endpoint.parse("127.0.0.1:15053"),)),
        rng=random.Random(1),
    )
    server.start()
    common = ("--seconds", str(options.seconds), "--window", str(options.window))
    rounds: list[dict[Row, dict[str, float]]] = []
    before = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        nursery.start_soon(server.run)
        for number in range(options.rounds + 1):
            found = {
                row: await asked(pod if row.is_ours else bare, *row.words, *common) for row in ROWS
            }
            if number == 0:
                before = resident_kib()  # the first round fills what is remembered
            else:
                rounds.append(found)
        nursery.cancel_scope.cancel()
    for row in ROWS:
        show(row, rounds)
    print(f"grown by {resident_kib() - before} KiB after the first round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=32)
    options = parser.parse_args()
    if shutil.which("dnsmasq") is None:
        sys.exit("needs dnsmasq")
    trio.run(measure, options)


if __name__ == "__main__":
    main()
