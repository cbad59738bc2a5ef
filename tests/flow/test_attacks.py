"""Peers, gateways and applications that mean harm, against real proxies over real sockets."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import h2.events
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes

from tests.support import peers
from tests.support.builders import a_gateway, a_policy, a_service, a_workload, an_identity
from tests.support.certs import a_certificate, a_name
from tests.support.flow import Mesh, a_mesh, a_pair, connect, expect_abort, loopback_address
from tests.support.handshakes import secure
from tests.support.raw_hbone import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    SETTINGS,
    RawFrame,
    RawPeer,
    block,
    frame,
    number,
)
from tests.support.scripted import a_scripted_client
from tests.support.tunnels import Heard, a_tunnel_pair
from ztunnel.errors import PeerError
from ztunnel.model.workload import TunnelProtocol
from ztunnel.proxy.double import InnerConnection
from ztunnel.tls.context import TlsContexts
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.sockets import local_pair

HOST = "cart.far.svc.cluster.local"
GATEWAY_ID = an_identity("gateway", "istio-system")
FRONTEND = a_name("frontend")
SECRET = b"for the far end's eyes only"
YES = block([(":status", "200")])


def say_yes(stream_id: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream_id, YES)


def take_back(stream_id: int, code: ErrorCodes) -> bytes:
    return say_yes(stream_id) + frame(RST_STREAM, 0, stream_id, number(code))


class FalseGateway:
    """A gateway with a good certificate that answers the first request as `first` says."""

    def __init__(self, context: ssl.SSLContext, first: str) -> None:
        self._context = context
        self._first = first
        self._requests = 0
        self.heard = bytearray()  # the payload of all DATA

    async def serve(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._accept, [listener])

    async def _accept(self, stream: trio.SocketStream) -> None:
        peer = await RawPeer.accept(stream, self._context)
        await peer.send(frame(SETTINGS))
        with suppress(AssertionError, trio.ClosedResourceError):
            while (each := await peer.frame()) is not None:
                await self._digest(peer, each)
        await peer.aclose()

    async def _digest(self, peer: RawPeer, each: RawFrame) -> None:
        if each.kind == DATA:
            self.heard += each.payload
        if each.kind != HEADERS:
            return
        self._requests += 1
        if self._requests > 1 or self._first == "yes":
            await peer.send(say_yes(each.stream_id))
        elif self._first == "refused":
            await peer.send(take_back(each.stream_id, ErrorCodes.REFUSED_STREAM))
        elif self._first == "cancelled":
            await peer.send(take_back(each.stream_id, ErrorCodes.CANCEL))
        elif self._first == "ended":
            await peer.send(say_yes(each.stream_id) + frame(DATA, END_STREAM, each.stream_id))
        else:
            await peer.send(say_yes(each.stream_id) + b"\xff" * 9)  # no frame at all
            await peer.aclose()


@asynccontextmanager
async def behind_a_false_gateway(
    first: str,
) -> AsyncIterator[tuple[Mesh, FalseGateway, tuple[str, int]]]:
    """A client whose server is in another network, behind the gateway."""
    async with a_mesh(tls_handshake_seconds=1.0) as mesh:
        client_ip, gateway_ip = loopback_address(), loopback_address()
        listener, port = await peers.listen(gateway_ip)
        client_workload = a_workload(
            "client", sa="frontend", ips=[client_ip], protocol=TunnelProtocol.HBONE
        )
        client = await mesh.add_proxy(client_workload, hbone=0)
        vip = (client_ip, client.addresses["outbound"].port)
        mesh.put(
            a_workload("client", sa="frontend", ips=[], protocol=TunnelProtocol.HBONE),
            a_workload("gateway", ns="istio-system", sa="gateway", ips=[gateway_ip], network="far"),
            a_workload(
                "server",
                ns="far",
                sa="cart",
                ips=[loopback_address()],
                network="far",
                protocol=TunnelProtocol.HBONE,
                network_gateway=a_gateway(f"far/{gateway_ip}", port),
                services={f"far/{HOST}": {vip[1]: 80}},
            ),
            a_service(
                HOST,
                ns="far",
                vips=[client_ip],
                port_map={vip[1]: 80},
                subject_alt_names=(str(an_identity("cart", "far")),),
            ),
        )
        certificate = mesh.authority.issue(GATEWAY_ID)
        context = TlsContexts(own_records=False).server(certificate).ssl_context
        gateway = FalseGateway(context, first)
        mesh.nursery.start_soon(gateway.serve, listener)
        yield mesh, gateway, vip


@pytest.mark.parametrize("first", ["refused", "cancelled", "ended", "closed"])
async def test_a_gateway_that_takes_back_its_yes_never_reads_what_is_for_the_far_end(
    first: str,
) -> None:
    async with behind_a_false_gateway(first) as (mesh, gateway, vip):
        async with connect(vip) as stream:
            await stream.send_all(SECRET)
            await expect_abort(stream)
        [line] = await mesh.lines.wait_for_ends(1)
        assert line["level"] == "error"
        assert SECRET not in gateway.heard


async def test_an_outer_tunnel_is_given_back_when_there_is_no_descriptor_for_the_inner(
    monkeypatch,
) -> None:
    def exhausted() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("ztunnel.proxy.double.local_pair", exhausted)
    async with behind_a_false_gateway("yes") as (mesh, _, vip):
        async with connect(vip) as stream:
            await expect_abort(stream)
        [line] = await mesh.lines.wait_for_ends(1)
        assert line["error"] == "io error: Too many open files"
        [client] = mesh.running
        [tunnel] = client.pool.tunnels()
        assert not tunnel.core.streams


async def test_a_gateway_that_never_ends_the_outer_tunnel_does_not_keep_it(monkeypatch) -> None:
    monkeypatch.setattr("ztunnel.proxy.double.LINGER_SECONDS", 0.05)
    far_id = an_identity("cart", "far")
    async with a_mesh() as mesh, a_tunnel_pair(mesh.node.reactor) as outer:
        node = mesh.node
        stream, served = await outer.a_stream()
        inside, gateway_end = local_pair()
        relay = StreamRelay(node.reactor, gateway_end, outer.server, served, Heard().ended)
        node.reactor.register(gateway_end, relay)
        inner = InnerConnection(node, Heard().on_failed)
        context = node.tls.server(mesh.authority.issue(far_id))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(secure, inside, context, server_side=True))
            near = inner.join(outer.client, stream)
            await inner.establish(near, (far_id,), an_identity("frontend"))
        served.owner = None  # the gateway hears nothing and says nothing from now on
        inner.close()
        await outer.client_owner.until("on_released")
        assert not outer.client.core.streams
        relay.cut(PeerError("the test is over"))
        inside.close()


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_urgent_data_neither_holds_up_what_follows_nor_gets_lost(
    protocol: TunnelProtocol,
) -> None:
    async with a_pair(protocol=protocol) as pair:
        pair.serve(peers.echo)
        stream = connect(pair.vip)  # nobody has accepted yet: all of it will lie there at once
        sock = stream.socket
        await sock.send(b"abc")
        await sock.send(b"!", socket.MSG_OOB)
        await sock.send(b"def")
        async with stream:
            with trio.fail_after(3):
                assert await peers.read_exactly(stream, 7) == b"abc!def"


async def test_urgent_data_does_not_stop_what_moves_inside_the_kernel(monkeypatch) -> None:
    monkeypatch.setattr("ztunnel.transport.socket_relay.WORTH_BYTES", 1)
    async with a_pair(protocol=TunnelProtocol.NONE) as pair:
        pair.serve(peers.echo)
        async with await pair.call() as stream:
            for word in (b"copied", b"spliced"):
                await stream.send_all(word)
                assert await peers.read_exactly(stream, len(word)) == word
            for piece, flags in ((b"abc", 0), (b"!", socket.MSG_OOB), (b"def", 0)):
                await stream.socket.send(piece, flags)
            with trio.fail_after(3):
                assert await peers.read_exactly(stream, 7) == b"abc!def"
                await stream.send_eof()
                assert await peers.read_to_end(stream) == b""


async def test_one_address_cannot_hold_all_handshakes_of_the_node() -> None:
    async with a_pair(max_handshakes=4) as pair:
        pair.serve(peers.echo)
        source = (loopback_address(), 0)
        silent = [socket.create_connection(pair.hbone, source_address=source) for _ in range(4)]
        await trio.testing.wait_all_tasks_blocked()
        assert pair.mesh.node.handshakes.taken == 4
        async with await pair.call() as stream:  # comes from another address
            await stream.send_all(b"hello")
            with trio.fail_after(3):
                assert await peers.read_exactly(stream, 5) == b"hello"
        line = await pair.lines.wait_for("gave way")
        assert f"src.addr={source[0]}:" in line
        for sock in silent:
            sock.close()


async def test_streams_of_a_tunnel_count_among_the_connections_of_the_pod() -> None:
    async with a_pair(max_connections_per_pod=1) as pair:
        pair.serve(peers.echo)
        host, port = pair.app_address
        certificate = a_certificate(FRONTEND, authority=pair.mesh.authority)
        async with a_scripted_client(pair.hbone, certificate) as client:
            first = await client.request(f"{host}:{port}")
            assert await client.status(first) == 200
            assert await client.status(await client.request(f"{host}:{port}")) == 503
            client.h2.reset_stream(first, ErrorCodes.CANCEL)
            await client.send()
            await pair.lines.wait_for_ends(2)
            assert await client.status(await client.request(f"{host}:{port}")) == 200
        assert pair.server.context.connections.taken <= 1
    assert pair.server.context.connections.taken == 0


@pytest.mark.parametrize("door", ["outbound", "inbound", "inbound plaintext"])
async def test_a_bug_in_classifying_ends_one_connection_and_keeps_no_place(
    door: str, monkeypatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    async with a_pair() as pair:
        pair.serve(peers.echo)
        host, port = pair.app_address
        certificate = a_certificate(FRONTEND, authority=pair.mesh.authority)
        async with a_scripted_client(pair.hbone, certificate) as client:
            running = await client.request(f"{host}:{port}")
            assert await client.status(running) == 200
            with monkeypatch.context() as patch:
                patch.setattr("ztunnel.proxy.outbound.route", broken)
                patch.setattr("ztunnel.proxy.inbound_stream.admit", broken)
                patch.setattr("ztunnel.proxy.plaintext.admit_plaintext", broken)
                if door == "inbound":
                    # Not what was asked before: that would not be classified anew.
                    forwarded = {"forwarded": "host=cart.shop.svc.cluster.local"}
                    stream = await client.request(f"{host}:{port}", **forwarded)
                    assert await client.status(stream) == 503
                else:
                    address = pair.vip if door == "outbound" else pair.plaintext
                    async with connect(address) as stream:
                        await expect_abort(stream)
                [line] = await pair.lines.wait_for_ends(1)
            assert line["error"] == "internal error: a bug"
            client.h2.send_data(running, b"hello")
            await client.send()
            assert (await client.until(h2.events.DataReceived)).data == b"hello"
        places = (pair.client.context.connections, pair.server.context.connections)
        assert [each.taken for each in places] in ([0, 0], [0, 1])
        assert pair.lines.take_bugs() == 1


async def test_a_connection_that_cannot_be_judged_again_is_cut_and_the_next_is_judged(
    monkeypatch,
) -> None:
    asked = []

    def broken(*_: object) -> None:
        asked.append(1)
        raise RuntimeError("a bug")

    async with a_pair() as pair:
        pair.serve(peers.echo)
        streams = [await pair.call() for _ in range(2)]
        for stream in streams:
            await stream.send_all(b"hello")
            assert await peers.read_exactly(stream, 5) == b"hello"
        monkeypatch.setattr("ztunnel.proxy.supervision.authorize", broken)
        pair.mesh.put(a_policy("new"))
        for stream in streams:
            await expect_abort(stream)
            await stream.aclose()
        await pair.lines.wait_for_ends(4)
        assert len(asked) == 2
        assert {line["reason"] for line in pair.lines.ended("inbound")} == {"internal"}
        assert pair.lines.take_bugs() == 2
