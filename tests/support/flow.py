"""Two of our proxies in one process, over loopback: everything real but redirection.

A caller connects to the client pod's outbound port; since nothing redirected it, that very address is
the "original destination", so a service owns it as its VIP. Each mesh has loopback addresses of its own.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from tests.support.builders import a_service, a_workload
from ztunnel.config import Config
from ztunnel.decide.classify import illegal_ports
from ztunnel.identity.dev_ca import DevelopmentCa, DevelopmentIssuer, wall_clock
from ztunnel.identity.manager import CertificateManager
from ztunnel.model.workload import TunnelProtocol, Workload
from ztunnel.proxy.context import NodeContext, Places
from ztunnel.proxy.workload_proxy import Doors, WorkloadProxy
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.access_log import AccessLog
from ztunnel.telemetry.log import Pipeline
from ztunnel.telemetry.metrics import Metrics
from ztunnel.tls.context import TlsContexts
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.hbone.settings import HboneSettings
from ztunnel.wire.zds import PodInfo

_numbers = itertools.count(1)


class Lines:
    """Where log lines go in a test."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._more = trio.Event()

    def write(self, line: str) -> None:
        self.all.append(line.rstrip("\n"))
        self._more.set()

    def access(self) -> list[str]:
        return [line for line in self.all if "\taccess\t" in line]

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
    proxies: list[WorkloadProxy] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.node.store

    def put(self, *items: object, **more: object) -> None:
        workloads = [item for item in items if isinstance(item, Workload)]
        services = [item for item in items if type(item).__name__ == "Service"]
        policies = [item for item in items if type(item).__name__ == "Policy"]
        self.store.apply(
            Update(workloads=workloads, services=services, policies=policies, **more)
        )

    async def add_proxy(self, workload: Workload, **doors: int) -> WorkloadProxy:
        """Serve `workload` at its first address."""
        sockets = SocketFactory(netns=None, mark=None, keepalive=None, port_reuse=False)
        info = PodInfo(workload.name, workload.namespace, workload.service_account)
        proxy = WorkloadProxy(self.node, info, sockets)
        ports = {"outbound": 0, "plaintext": 0, "hbone": 15008} | doors
        proxy.start(Doors(str(workload.ips[0]), **ports))
        self.nursery.start_soon(proxy.run)
        await trio.testing.wait_all_tasks_blocked()
        self.proxies.append(proxy)
        return proxy


@asynccontextmanager
async def a_mesh(config: Config | None = None, **config_fields: object) -> AsyncIterator[Mesh]:
    """Everything a node shares, running."""
    lines = Lines()
    pipeline = Pipeline(writer=lines)
    pipeline.set_up("debug", json=False)
    config = replace(config or Config(original_source=False), **config_fields)
    authority = DevelopmentCa.create()
    certificates = CertificateManager(
        DevelopmentIssuer(authority), clock=wall_clock, random=random.Random(1)
    )
    reactor = Reactor()
    node = NodeContext(
        config=config,
        store=Store(node=""),
        certificates=certificates,
        tls=TlsContexts(own_records=config.own_records),
        reactor=reactor,
        access_log=AccessLog(pipeline),
        metrics=Metrics(),
        rng=random.Random(1),
        handshakes=Places(config.max_handshakes),
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

    async def call(self) -> trio.SocketStream:
        """Open a connection as an application of the client pod would."""
        return await trio.open_tcp_stream(*self.vip)


@asynccontextmanager
async def a_pair(
    *, protocol: TunnelProtocol = TunnelProtocol.HBONE, **config_fields: object
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


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes, then finish."""
    async with stream:
        async for chunk in stream:
            await stream.send_all(chunk)
        await stream.send_eof()

