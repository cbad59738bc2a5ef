"""A DNS server of ours for one pod, real resolvers to forward to, and programs that ask."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
import trio.testing

from tests.support.builders import a_workload
from ztunnel.devmesh.cluster import Member
from ztunnel.dns.server import DnsServer, DnsSettings
from ztunnel.errors import RouteError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Endpoint
from ztunnel.model.workload import Workload
from ztunnel.state.store import Store
from ztunnel.telemetry.metrics import Metrics
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory

DEADLINE_SECONDS = 20.0
POLL_SECONDS = 0.01
NO_FILE = Path("/nonexistent/resolv.conf")


class FakeClient:
    """The pod `web` of the namespace `shop`; `workload` None means the control plane is silent."""

    def __init__(self, workload: Workload | None) -> None:
        self.known = workload
        self.told = trio.Event()
        self.patience_seconds = 5.0

    @classmethod
    def web(cls, ip: str = "10.1.0.1") -> FakeClient:
        return cls(
            a_workload("web", ns="shop", ips=[ip], canonical_name="web", canonical_revision="v1")
        )

    def workload(self) -> Workload | None:
        return self.known

    async def known_workload(self) -> Workload:
        with trio.move_on_after(self.patience_seconds):
            await self.told.wait()
        if self.known is None:
            raise RouteError("failed to fetch information about local workload")
        return self.known


@dataclass
class Served:
    server: DnsServer
    store: Store
    metrics: Metrics
    client: FakeClient
    nursery: trio.Nursery
    undo: ExitStack

    def counted(self, family: str, *labels: str) -> float:
        count: float = getattr(self.metrics, family).count(*labels).value
        return count


@asynccontextmanager
async def a_dns_server(
    store: Store,
    *,
    netns: PodNetns | None = None,
    client: FakeClient | None = None,
    addresses: tuple[str, ...] = ("127.0.0.1:0",),
    resolv_conf: Path = NO_FILE,
    mark: int | None = None,
    **settings: object,
) -> AsyncIterator[Served]:
    """Run a server; by default in this namespace, on a free port."""
    client = client or FakeClient.web()
    metrics, reactor = Metrics(), Reactor()
    server = DnsServer(
        client,
        Namespace("shop"),
        sockets=SocketFactory(netns=netns, mark=mark, keepalive=None, port_reuse=netns is not None),
        reactor=reactor,
        store=store,
        metrics=metrics,
        settings=DnsSettings(
            addresses=tuple(Endpoint.parse(text) for text in addresses),
            resolv_conf=resolv_conf,
            **settings,  # type: ignore[arg-type] # what a test names, it names right
        ),
        rng=random.Random(1),
    )
    server.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        nursery.start_soon(server.run)
        try:
            await trio.testing.wait_all_tasks_blocked()
            with ExitStack() as undo:
                yield Served(server, store, metrics, client, nursery, undo)
        finally:
            nursery.cancel_scope.cancel()


@contextmanager
def running(member: Member, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program inside a namespace until the end of the block."""
    program = member.popen(*words)
    try:
        yield program
    finally:
        program.kill()
        program.wait()
        if program.stdout:
            program.stdout.close()


@contextmanager
def running_script(member: Member, source: str, *words: str) -> Iterator[None]:
    """Run Python inside until the end of the block; it begins when that says `ready`."""
    with running(member, sys.executable, "-I", "-S", "-c", source, *words) as program:
        assert program.stdout
        assert program.stdout.readline() == b"ready\n"
        yield


async def printed(member: Member, *words: str, check: bool = True) -> str:
    """Run a program inside while the server goes on serving; return what it printed."""
    with trio.fail_after(DEADLINE_SECONDS):
        done = await trio.run_process(
            member.command(*words), capture_stdout=True, capture_stderr=True, check=False
        )
    text = done.stdout.decode()
    assert not check or done.returncode == 0, f"{words}: {text}{done.stderr.decode()}"
    return text


async def until(is_so: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for what nobody tells of; others may be busy all the while."""
    with trio.fail_after(seconds):
        while not is_so():  # noqa: ASYNC110 - see above
            await trio.sleep(POLL_SECONDS)


def with_resolv_conf(path: Path, *words: str) -> list[str]:
    """Make the command that sees `path` as its /etc/resolv.conf; inside a namespace only."""
    script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(path), *words]
