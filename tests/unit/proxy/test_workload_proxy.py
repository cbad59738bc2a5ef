from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.builders import a_workload
from tests.support.certs import a_certificate
from tests.support.flow import Mesh, a_mesh, a_pair, address_of, connect, loopback_address
from tests.support.peers import echo, read_exactly, read_to_end
from tests.support.scripted import a_scripted_client
from tests.support.tunnels import open_descriptors, open_sockets
from ztunnel.errors import ConfigError
from ztunnel.model.workload import Workload
from ztunnel.proxy.workload_proxy import Doors, WorkloadProxy
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.zds import PodInfo


def a_proxy(mesh: Mesh, workload: Workload) -> WorkloadProxy:
    sockets = SocketFactory(netns=None, mark=None, keepalive=None, port_reuse=False)
    info = PodInfo(workload.name, workload.namespace, workload.service_account)
    return WorkloadProxy(mesh.node, info, sockets)


def close_doors(proxy: WorkloadProxy) -> None:
    proxy._close_everything()


async def test_it_listens_for_each_kind_of_traffic() -> None:
    async with a_mesh(socks5_enabled=False) as mesh:
        proxy = a_proxy(mesh, a_workload())
        proxy.start(Doors(loopback_address(), outbound=0, plaintext=0, hbone=0))
        assert set(proxy.addresses) == {"outbound", "inbound plaintext", "inbound"}
        assert len({address.port for address in proxy.addresses.values()}) == 3
        close_doors(proxy)
        assert proxy.addresses == {}


async def test_if_one_port_is_taken_none_is_bound() -> None:
    async with a_mesh() as mesh:
        host = loopback_address()
        first = a_proxy(mesh, a_workload())
        first.start(Doors(host, outbound=0, plaintext=0, hbone=0))
        taken = first.addresses["inbound"].port
        before = open_descriptors()
        second = a_proxy(mesh, a_workload())
        with pytest.raises(ConfigError, match=f"failed to bind to address {host}:{taken}"):
            second.start(Doors(host, outbound=0, plaintext=0, hbone=taken))
        assert second.addresses == {}
        assert open_descriptors() == before
        close_doors(first)


async def test_whoever_comes_between_start_and_run_is_served() -> None:
    async with a_mesh() as mesh:
        workload = a_workload("early", ips=[loopback_address()])
        mesh.put(workload)
        proxy = a_proxy(mesh, workload)
        proxy.start(Doors(str(workload.ips[0]), outbound=0, plaintext=0, hbone=0))
        address = address_of(proxy, "inbound")
        certificate = a_certificate(authority=mesh.authority)
        async with trio.open_nursery() as nursery:
            served = trio.Event()

            async def call() -> None:
                async with a_scripted_client(address, certificate):
                    served.set()

            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert not served.is_set()
            mesh.nursery.start_soon(mesh._run, proxy)
            await served.wait()


async def test_when_run_ends_nothing_is_left() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        before = open_sockets()
        stream = await pair.call()
        await stream.send_all(b"x")
        assert await read_exactly(stream, 1) == b"x"
        for proxy in (pair.client, pair.server):
            pair.mesh.running[proxy].cancel()
        await pair.lines.wait_for_ends(2)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(stream)
        await stream.aclose()
        assert len(pair.client.pool) == len(pair.server.tunnels) == len(pair.mesh.node.reactor) == 0
        assert len(pair.client.context.live) == len(pair.server.context.live) == 0
        # Six listeners are closed as well; the application may still hold its end.
        assert open_sockets() <= before - 5


async def test_a_drain_with_nothing_in_progress_ends_at_once() -> None:
    async with a_mesh() as mesh:
        workload = a_workload("idle", ips=[loopback_address()])
        proxy = await mesh.add_proxy(workload, hbone=0)
        address = address_of(proxy, "outbound")
        with trio.fail_after(1):
            await proxy.drain(60)
        with pytest.raises(ConnectionRefusedError):
            connect(address)
