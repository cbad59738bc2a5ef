from __future__ import annotations

from http import HTTPStatus

import h2.events
import pytest
import trio
import trio.testing
from msgspec import structs

from tests.support.certs import a_certificate, a_name
from tests.support.flow import Pair, a_pair
from tests.support.peers import echo, random_bytes, read_to_end
from tests.support.scripted import a_scripted_client
from ztunnel.errors import (
    DeniedError,
    DrainError,
    RejectedError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.model.network import Port
from ztunnel.model.workload import ApplicationTunnel, AppProtocol
from ztunnel.proxy.inbound_stream import status_of
from ztunnel.wire.headers import parse_baggage

FRONTEND = a_name("frontend")
HOST = "cart.shop.svc.cluster.local"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RejectedError("not for us", status=400), HTTPStatus.BAD_REQUEST),
        (RejectedError("no such service", status=503), HTTPStatus.SERVICE_UNAVAILABLE),
        (DeniedError("policy"), HTTPStatus.UNAUTHORIZED),
        (UnreachableError("down"), HTTPStatus.SERVICE_UNAVAILABLE),
        (DrainError("going away"), HTTPStatus.SERVICE_UNAVAILABLE),
        (None, HTTPStatus.SERVICE_UNAVAILABLE),
    ],
)
def test_the_status_for_what_was_not_connected(error: ZtunnelError | None, status: int) -> None:
    assert status_of(error) == status


def a_client(pair: Pair):
    return a_scripted_client(pair.hbone, a_certificate(FRONTEND, authority=pair.mesh.authority))


def authority_of(pair: Pair) -> str:
    host, port = pair.app_address
    return f"{host}:{port}"


async def answer(client, stream: int) -> dict[bytes, bytes]:
    event = await client.until(h2.events.ResponseReceived, lambda e: e.stream_id == stream)
    return dict(event.headers)


@pytest.mark.parametrize("wanted", [True, False])
async def test_an_answer_carries_our_baggage_if_that_is_wanted(*, wanted: bool) -> None:
    async with a_pair(baggage_enabled=wanted) as pair:
        pair.serve(echo)
        async with a_client(pair) as client:
            headers = await answer(client, await client.request(authority_of(pair)))
        assert headers[b":status"] == b"200"
        assert (b"baggage" in headers) is wanted
        if wanted:
            assert parse_baggage([headers[b"baggage"]]).namespace == "shop"


async def test_a_host_name_with_a_service_port_leads_to_the_pods_own_port() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        async with a_client(pair) as client:
            stream = await client.request(f"{HOST}:{pair.vip[1]}", forwarded=f"host={HOST}")
            assert (await answer(client, stream))[b":status"] == b"200"
            [live] = pair.server.context.live.inbound
            assert str(live.actual) == authority_of(pair)
            assert (live.original, live.protocol) == (HOST, "HBONE")
        [line] = await pair.lines.wait_for_ends(1)
        assert line["dst.hbone_addr"] == f"{HOST}:{pair.vip[1]}"
        assert line["dst.service"] == HOST


def with_tunnel(pair: Pair, protocol: AppProtocol) -> None:
    tunnel = ApplicationTunnel(protocol=protocol, port=Port(pair.app_address[1]))
    pair.mesh.put(structs.replace(pair.server_workload, application_tunnel=tunnel))


async def received_by_app(pair: Pair, authority: str) -> bytes:
    """Say hello through a tunnel to `authority`; give all that the application got."""
    got: list[bytes] = []
    done = trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        got.append(await read_to_end(stream))
        done.set()

    pair.serve(app)
    async with a_client(pair) as client:
        stream = await client.request(authority)
        assert (await answer(client, stream))[b":status"] == b"200"
        client.h2.send_data(stream, b"hello", end_stream=True)
        await client.send()
        with trio.fail_after(10):
            await done.wait()
        await pair.lines.wait_for_ends(1)
    return got[0]


async def test_an_application_tunnel_may_only_change_the_port() -> None:
    async with a_pair() as pair:
        with_tunnel(pair, AppProtocol.NONE)
        assert await received_by_app(pair, "192.0.2.77:80") == b"hello"


async def test_an_application_that_wants_it_gets_a_proxy_header_first() -> None:
    async with a_pair(localhost_app_tunnel=False) as pair:
        with_tunnel(pair, AppProtocol.PROXY)
        received = await received_by_app(pair, "192.0.2.77:80")
        assert received.startswith(b"\r\n\r\n\x00\r\nQUIT\n\x21\x11")
        assert b"\xc0\x00\x02\x4d" in received  # the destination that was asked for
        assert str(FRONTEND).encode() in received
        assert received.endswith(b"hello")
        # The header is ours: only the client's bytes count.
        assert pair.lines.ended()[0].bytes == (0, 5)


async def test_a_client_that_gives_up_before_it_is_connected_leaves_no_dial() -> None:
    async with a_pair() as pair:
        # An application that accepts nobody: one waits in its queue, the next gets no answer.
        pair.app.socket.listen(0)
        async with a_client(pair) as client:
            first = await client.request(authority_of(pair))
            assert (await answer(client, first))[b":status"] == b"200"
            stream = await client.request(authority_of(pair))
            client.h2.send_data(stream, b"early", end_stream=True)
            client.h2.ping(b"12345678")
            await client.send()
            await client.until(h2.events.PingAckReceived)
            client.h2.reset_stream(stream, 8)
            await client.send()
            [line] = await pair.lines.wait_for_ends(1)
            assert line["error"] == "client reset the stream before it was connected (code 8)"
            assert len(pair.server.context.live) == 1


async def test_what_comes_before_the_answer_counts_for_what_the_tunnel_may_hold() -> None:
    async with a_pair() as pair:
        pair.app.socket.listen(0)
        async with a_client(pair) as client:
            first = await client.request(authority_of(pair))
            assert (await answer(client, first))[b":status"] == b"200"
            stream = await client.request(authority_of(pair))
            for byte in random_bytes(2000, seed=1):
                client.h2.send_data(stream, bytes([byte]))
            client.h2.ping(b"12345678")
            await client.send()
            await client.until(h2.events.PingAckReceived)
            [tunnel] = pair.server.tunnels.all()
            assert tunnel._held_bytes == 2000
            client.h2.reset_stream(stream, 8)
            await client.send()
            await pair.lines.wait_for_ends(1)
            assert tunnel._held_bytes == 0


async def test_a_half_closed_request_is_served_to_its_end() -> None:
    async with a_pair() as pair:
        assert await received_by_app(pair, authority_of(pair)) == b"hello"
        [line] = pair.lines.ended()
        assert line["level"] == "info"
