"""Two of our proxies in one process, over loopback: everything real but redirection.

A caller connects to the client pod's outbound port; since nothing redirected it, that very address
is the "original destination", so a service owns it as its VIP. Each mesh has loopback addresses of
its own. When a mesh ends it sees to it that nothing is left in the reactor and no bug was caught.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import trio
import trio.testing

from tests.support.builders import a_service, a_workload
from tests.support.peers import Handler, serve
from ztunnel.config import Config
from ztunnel.decide.classify import illegal_ports
from ztunnel.identity.dev_ca import DevelopmentCa, DevelopmentIssuer, wall_clock
from ztunnel.identity.manager import CertificateIssuer, CertificateManager
from ztunnel.model.workload import TunnelProtocol, Workload
from ztunnel.proxy.context import NodeContext
from ztunnel.proxy.handshakes import Handshakes
from ztunnel.proxy.workload_proxy import Doors, WorkloadProxy
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.access_log import AccessLog
from ztunnel.telemetry.log import PIPELINE, Pipeline
from ztunnel.telemetry.metrics import Metrics
from ztunnel.tls.context import TlsContexts
from ztunnel.tls.crl import Revocations
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.hbone.settings import HboneSettings
from ztunnel.wire.zds import PodInfo

_numbers = itertools.count(1)

ENDED = re.compile(r"\taccess\tconnection (complete|failed)\t")
FIELD = re.compile(r'([a-z_.]+)=("(?:[^"\\]|\\.)*"|\S*)')
# What our code says when it caught a bug of its own.
BUGS = ("failed unexpectedly", "handler failed", "flush failed", "deadline failed", "was dropped")


class Ended(dict[str, str]):
    """The fields of an access-log line, with `level` and `message`."""

    @classmethod
    def read(cls, line: str) -> Ended:
        _, level, _, message, fields = line.split("\t")
        found = {key: value.strip('"') for key, value in FIELD.findall(fields)}
        return cls(found, level=level, message=message)

    @property
    def bytes(self) -> tuple[int, int]:
        """Return the bytes sent and received, as the application on this side counts."""
        return int(self["bytes_sent"]), int(self["bytes_recv"])


class Lines:
    """Where log lines go in a test."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._more = trio.Event()

    def write(self, line: str) -> None:
        self.all.append(line.rstrip("\n"))
        self._more.set()

    def ended(self, direction: str | None = None) -> list[Ended]:
        """Give what was said about connections that ended, in order."""
        every = [Ended.read(line) for line in self.all if ENDED.search(line)]
        return [one for one in every if direction in (None, one["direction"])]

    async def wait_for_ends(self, number: int, *, seconds: float = 10) -> list[Ended]:
        """Wait for the `number`th end of a connection, and see that there was no other."""
        with trio.fail_after(seconds):
            while len(self.ended()) < number:
                self._more = trio.Event()
                await self._more.wait()
        # A line too many would come with the same event or in the next turn.
        await trio.testing.wait_all_tasks_blocked()
        assert len(self.ended()) == number, self.ended()
        return self.ended()

    def take_bugs(self) -> int:
        """Count the bugs of ours that were caught, and forget them: the test wanted them."""
        bugs = [line for line in self.all if any(bug in line for bug in BUGS)]
        self.all = [line for line in self.all if line not in bugs]
        return len(bugs)

    async def wait_for(self, *parts: str, seconds: float = 10) -> str:
        """Wait for a line that contains all of `parts`."""
        with trio.fail_after(seconds):
            while True:
                for line in self.all:
                    if all(part in line for part in parts):
                        return line
                self._more = trio.Event()
                await self._more.wait()


def loopback_address() -> str:
    """An address that no other test uses: the process and a counter choose it."""
    number = next(_numbers)
    return f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.{number % 250 + 1}"


@dataclass
class Mesh:
    """One node's worth of collaborators, and the pods on it."""

    nursery: trio.Nursery
    node: NodeContext
    lines: Lines
    authority: DevelopmentCa
    running: dict[WorkloadProxy, trio.CancelScope] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.node.store

    def put(self, *items: Any, **more: Any) -> None:
        workloads = [item for item in items if isinstance(item, Workload)]
        services = [item for item in items if type(item).__name__ == "Service"]
        policies = [item for item in items if type(item).__name__ == "Policy"]
        self.store.apply(Update(workloads=workloads, services=services, policies=policies, **more))

    async def add_proxy(self, workload: Workload, **doors: Any) -> WorkloadProxy:
        """Serve `workload` at its first address."""
        sockets = SocketFactory(netns=None, mark=None, keepalive=None, port_reuse=False)
        info = PodInfo(workload.name, workload.namespace, workload.service_account)
        proxy = WorkloadProxy(self.node, info, sockets)
        ports = {"outbound": 0, "plaintext": 0, "hbone": 15008} | doors
        proxy.start(Doors(str(workload.ips[0]), **ports))
        self.nursery.start_soon(self._run, proxy)
        await trio.testing.wait_all_tasks_blocked()
        return proxy

    async def _run(self, proxy: WorkloadProxy) -> None:
        with trio.CancelScope() as self.running[proxy]:
            await proxy.run()


@asynccontextmanager
async def a_mesh(
    config: Config | None = None,
    *,
    issuer: CertificateIssuer | None = None,
    revocations: Revocations | None = None,
    **config_fields: Any,
) -> AsyncIterator[Mesh]:
    """Everything a node shares, running; `issuer` stands in for an authority of its own."""
    lines = Lines()
    writer: Any = lines  # has what of a writer is used here
    pipeline = Pipeline(writer=writer)
    pipeline.set_up("debug", json=False)
    usual_writer, PIPELINE.writer = PIPELINE.writer, writer
    config = replace(config or Config(original_source=False, dns_enabled=False), **config_fields)
    authority = DevelopmentCa.create()
    certificates = CertificateManager(
        issuer or DevelopmentIssuer(authority), clock=wall_clock, random=random.Random(1)
    )
    reactor = Reactor()
    node = NodeContext(
        config=config,
        store=Store(node=""),
        certificates=certificates,
        tls=TlsContexts(
            own_records=config.own_records,
            revocations=revocations,
            resumption=config.tls_resumption,
        ),
        reactor=reactor,
        access_log=AccessLog(pipeline),
        metrics=Metrics(),
        rng=random.Random(1),
        handshakes=Handshakes(config.max_handshakes),
        client_settings=HboneSettings(),
        server_settings=HboneSettings(),
        illegal_ports=illegal_ports(has_socks5=False),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(certificates.run)
        nursery.start_soon(reactor.run)
        try:
            yield Mesh(nursery, node, lines, authority)
        finally:
            nursery.cancel_scope.cancel()
            PIPELINE.writer = usual_writer
    assert len(reactor) == 0, "a socket was left in the reactor"
    assert lines.take_bugs() == 0, "a bug was caught, see the log"


@dataclass
class Pair:
    """A client pod that calls a server pod through two proxies."""

    mesh: Mesh
    client: WorkloadProxy
    server: WorkloadProxy
    client_workload: Workload
    server_workload: Workload
    vip: tuple[str, int]
    app: trio.SocketListener

    @property
    def lines(self) -> Lines:
        return self.mesh.lines

    @property
    def hbone(self) -> tuple[str, int]:
        """Where the server pod takes tunnels."""
        return address_of(self.server, "inbound")

    @property
    def plaintext(self) -> tuple[str, int]:
        """Where the server pod takes what came outside any tunnel."""
        return address_of(self.server, "inbound plaintext")

    @property
    def app_address(self) -> tuple[str, int]:
        host, port = self.app.socket.getsockname()
        return host, port

    def serve(self, handler: Handler) -> None:
        """Run the server pod's application."""
        self.mesh.nursery.start_soon(serve, handler, self.app)

    async def call(self) -> trio.SocketStream:
        """Open a connection as an application of the client pod would."""
        await trio.lowlevel.checkpoint()
        return connect(self.vip)

    async def ends(self) -> tuple[Ended, Ended]:
        """Wait for the end of the one connection: what client side and server side say."""
        await self.lines.wait_for_ends(2)
        return one(self.lines.ended("outbound")), one(self.lines.ended("inbound"))


@asynccontextmanager
async def a_pair(
    *, protocol: TunnelProtocol = TunnelProtocol.HBONE, **config_fields: Any
) -> AsyncIterator[Pair]:
    """A client pod, a server pod with one application port, and a service in front of it."""
    async with a_mesh(**config_fields) as mesh:
        client_ip, server_ip = loopback_address(), loopback_address()
        sock = trio.socket.socket()
        await sock.bind((server_ip, 0))
        sock.listen(128)
        app = trio.SocketListener(sock)
        app_port = sock.getsockname()[1]
        client_workload = a_workload(
            "client", ns="shop", sa="frontend", ips=[client_ip], protocol=TunnelProtocol.HBONE
        )
        client = await mesh.add_proxy(client_workload, hbone=0)
        vip_port = client.addresses["outbound"].port
        host = "cart.shop.svc.cluster.local"
        server_workload = a_workload(
            "server",
            ns="shop",
            sa="cart",
            ips=[server_ip],
            protocol=protocol,
            services={f"shop/{host}": {vip_port: app_port}},
        )
        service = a_service(host, ns="shop", vips=[client_ip], port_map={vip_port: app_port})
        # The client's own address is the VIP: so it must not be a workload's address as well.
        mesh.put(
            a_workload("client", ns="shop", sa="frontend", ips=[], protocol=TunnelProtocol.HBONE),
            server_workload,
            service,
        )
        server = await mesh.add_proxy(server_workload)
        async with app:
            yield Pair(
                mesh, client, server, client_workload, server_workload, (client_ip, vip_port), app
            )


def address_of(proxy: WorkloadProxy, component: str) -> tuple[str, int]:
    address = proxy.addresses[component]
    return str(address.ip), address.port


def one(items: Iterable[Ended]) -> Ended:
    """Give the only item there is."""
    (item,) = items
    return item


def connect(address: tuple[str, int]) -> trio.SocketStream:
    """Connect before anybody can accept, let alone refuse: the kernel does it at once."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(socket.create_connection(address)))


async def expect_abort(stream: trio.SocketStream) -> bytes:
    """Read until the connection is reset; give what came before."""
    content = bytearray()
    with trio.fail_after(10):
        while True:
            try:
                data = await stream.receive_some(65_536)
            except trio.BrokenResourceError:
                return bytes(content)
            assert data, "the connection ended in good order"
            content += data


def abort(stream: trio.SocketStream) -> None:
    """Close with a reset, as a program does that is killed with data unread."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
