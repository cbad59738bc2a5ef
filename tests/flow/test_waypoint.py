"""A sandwiched waypoint: our proxy takes tunnels for somebody else and hands them on with PROXY."""

from __future__ import annotations

import struct

import pytest
import trio
from msgspec import structs

from tests.support.builders import a_gateway, deny
from tests.support.flow import Pair, a_pair, connect, expect_abort
from tests.support.peers import read_exactly
from ztunnel.model.policy import PolicyScope
from ztunnel.model.workload import ApplicationTunnel, AppProtocol
from ztunnel.wire.proxy_protocol import SIGNATURE

FRONTEND = b"spiffe://cluster.local/ns/shop/sa/frontend"
HOST = b"cart.shop.svc.cluster.local"


def fields(block: bytes) -> dict[int, bytes]:
    found = {}
    while block:
        kind, size = struct.unpack_from(">BH", block)
        found[kind] = block[3 : 3 + size]
        block = block[3 + size :]
    return found


def into_a_waypoint(pair: Pair, protocol: AppProtocol) -> None:
    """The server pod becomes a waypoint whose application listens on the application's port."""
    _, port = pair.app_address
    tunnel = ApplicationTunnel(protocol=protocol, port=port)
    pair.mesh.put(structs.replace(pair.server_workload, application_tunnel=tunnel))


async def test_the_application_of_a_waypoint_learns_who_calls_and_whom() -> None:
    async with a_pair(localhost_app_tunnel=False) as pair:
        into_a_waypoint(pair, AppProtocol.PROXY)
        heard: list[bytes] = []

        async def waypoint(stream: trio.SocketStream) -> None:
            async with stream:
                head = await read_exactly(stream, 16)
                heard.extend((head, await read_exactly(stream, int.from_bytes(head[14:16], "big"))))
                await stream.send_all(b"answer to " + await read_exactly(stream, 5))

        pair.serve(waypoint)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 15) == b"answer to hello"
        head, body = heard
        assert head[:12] == SIGNATURE
        assert head[12:14] == b"\x21\x11"
        assert body[4:8] == bytes(map(int, pair.hbone[0].split(".")))
        assert fields(body[12:]) == {0xD0: FRONTEND, 0xD1: HOST}
        outbound, inbound = await pair.ends()
        # The header is ours and counts as nobody's bytes.
        assert outbound.bytes == (5, 15)
        assert inbound.bytes == (15, 5)


async def test_without_a_header_the_bytes_come_as_they_are() -> None:
    async with a_pair() as pair:
        into_a_waypoint(pair, AppProtocol.NONE)

        async def waypoint(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.send_all(await read_exactly(stream, 5))

        pair.serve(waypoint)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
        await pair.ends()


async def test_a_pods_waypoint_is_asked_for_the_original_address() -> None:
    """Workload-attached: the tunnel goes to the waypoint, the authority stays the pod's."""
    async with a_pair() as pair:
        pair.mesh.put(structs.replace(pair.server_workload, waypoint=a_gateway("/127.255.255.254")))
        # Service-addressed traffic does not look at the workload's waypoint (dataplane.md 2.2).

        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.send_all(b"direct")

        pair.serve(answer)
        async with connect(pair.vip) as stream:
            assert await read_exactly(stream, 6) == b"direct"
        await pair.ends()


@pytest.mark.parametrize("loud", [True, False])
async def test_policy_decisions_are_logged_for_those_who_ask(loud: bool) -> None:
    async with a_pair(policy_info_logging=loud) as pair:
        pair.mesh.put(deny("shop/frontend", scope=PolicyScope.NAMESPACE))
        async with await pair.call() as stream:
            await expect_abort(stream)
        await pair.ends()
        said = [line for line in pair.lines.all if "\tinfo\trbac\tdeny policy match" in line]
        assert len(said) == loud
        assert all('policy="shop/deny"' in line for line in said)
