"""How many DNS queries a pod gets answered, and how fast: `python -m perf.dns_queries`, as root.

Rows: dnsmasq asked directly, the same through our server in the pod, and names of the mesh. The
load is one UDP socket with a window of queries under way, as a busy resolver library has them.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import select
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

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
WARM_UP_SECONDS = 0.3
RECEIVE_BYTES = 4096


def query(name: str, cookie: bytes = b"") -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    option = struct.pack("!HH", 10, len(cookie)) + cookie if cookie else b""
    opt = b"\0" + struct.pack("!HHIH", 41, 1232, 0, len(option)) + option
    return struct.pack("!HHHHH", 0x0100, 1, 0, 0, 1) + labels + b"\0" + b"\0\1\0\1" + opt


def load(
    name: str, seconds: float, window: int, *, server: str = RESOLVER, fresh: bool = False
) -> dict[str, float]:
    """Keep `window` queries under way; `fresh` makes each one differ from all before it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((server, 53))
    sock.settimeout(0)
    sent: dict[int, float] = {}
    times: list[float] = []
    number = lost = answers = 0
    plain, rng = query(name), random.Random(1)
    start = time.perf_counter()
    measured_from, end = start + WARM_UP_SECONDS, start + WARM_UP_SECONDS + seconds
    while (now := time.perf_counter()) < end:
        while len(sent) < window:
            number = (number + 1) & 0xFFFF
            rest = query(name, rng.randbytes(8)) if fresh else plain
            sock.send(number.to_bytes(2, "big") + rest)
            sent[number] = time.perf_counter()
        if not select.select([sock], [], [], 0.5)[0]:
            lost += len(sent)
            sent.clear()
            continue
        try:
            while True:
                data = sock.recv(RECEIVE_BYTES)
                asked = sent.pop(int.from_bytes(data[:2], "big"), None)
                answers += 1
                if asked is not None and now > measured_from:
                    times.append(time.perf_counter() - asked)
        except BlockingIOError:
            pass
    times.sort()
    return {
        "per_second": len(times) / seconds,
        "p50_us": times[len(times) // 2] * 1e6 if times else 0,
        "p99_us": times[len(times) * 99 // 100] * 1e6 if times else 0,
        "lost": lost,
        "answers": answers,
    }


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
    done = await trio.run_process(
        pod.command(sys.executable, "-P", __file__, "--load", *words), capture_stdout=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def show(row: str, found: dict[str, float], cpu: float = 0.0, grown: int = 0) -> None:
    print(
        f"{row:34} {found['per_second']:8.0f}/s  p50 {found['p50_us']:7.0f} us"
        f"  p99 {found['p99_us']:7.0f} us  lost {found['lost']:.0f}"
        f"  our CPU {cpu / found['answers'] * 1e6:5.1f} us each  grown {grown} KiB",
        flush=True,
    )


async def measure(seconds: float, window: int) -> None:
    with Cluster() as cluster:
        node = cluster.add_node("node")
        pod = cluster.add_pod(node, "pod", "10.1.0.1")
        resolver = cluster.add_outside("resolver", RESOLVER)
        program = resolver.popen(
            *("dnsmasq", "-k", "--no-resolv", "--no-hosts", "--user=root", "--pid-file"),
            *("--log-facility=/dev/null", f"--host-record={OTHER_NAME},192.0.2.1"),
        )  # fmt: skip
        try:
            await trio.sleep(0.5)
            common = ("--seconds", str(seconds), "--window", str(window))
            show("dnsmasq, directly", await asked(pod, OTHER_NAME, *common))
            apply_redirect(pod.netns, RedirectPlan(dns=True))
            await measure_ours(pod, common)
        finally:
            program.kill()
            program.wait()


async def measure_ours(pod: Pod, common: tuple[str, ...]) -> None:
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
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        nursery.start_soon(server.run)
        for row, words in (
            ("ours, mesh name", (MESH_NAME,)),
            ("ours, mesh name, each query new", (MESH_NAME, "--fresh")),
            ("ours, forwarded to dnsmasq", (OTHER_NAME,)),
            ("ours, forwarded again", (OTHER_NAME,)),
            ("ours, forwarded, each query new", (OTHER_NAME, "--fresh")),
        ):
            before, cpu = resident_kib(), cpu_seconds()
            found = await asked(pod, *words, *common)
            show(row, found, cpu_seconds() - cpu, resident_kib() - before)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--load", metavar="NAME", help="only ask for this name, and print numbers")
    parser.add_argument("--server", default=RESOLVER)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    if options.load:
        found = load(
            options.load,
            options.seconds,
            options.window,
            server=options.server,
            fresh=options.fresh,
        )
        print(json.dumps(found))
    elif shutil.which("dnsmasq") is None:
        sys.exit("needs dnsmasq")
    else:
        trio.run(measure, options.seconds, options.window)


if __name__ == "__main__":
    main()
