from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.support.builders import a_service, a_workload
from tests.support.certs import a_certificate, a_name, a_server_context
from tests.support.flow import Mesh, a_mesh, a_pair, connect, expect_abort, loopback_address
from tests.support.handshakes import secure
from tests.support.peers import echo
from tests.support.tunnels import Heard, facts
from ztunnel.model.identity import Identity
from ztunnel.model.workload import TunnelProtocol
from ztunnel.proxy.dialling import TunnelDialling
from ztunnel.proxy.greeting import Greeting
from ztunnel.tls.handshake import Handshake
from ztunnel.transport.attempt import Attempt
from ztunnel.transport.secure_dial import Raising
from ztunnel.transport.securing import Securing
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection


class ScriptedServer(Heard):
    """Takes tunnels and answers each CONNECT as it was told: a status, or a code to reset with."""

    def __init__(self, mesh: Mesh, *answers: str) -> None:
        super().__init__()
        self.mesh = mesh
        self.answers = list(answers)
        self.tunnels: list[Tunnel] = []

    async def serve(self, listener: trio.SocketListener, context) -> None:
        while True:
            try:
                accepted = await listener.accept()
            except trio.ClosedResourceError:
                return  # the scene is over
            sock = accepted.socket._sock.dup()  # type: ignore[attr-defined]
            accepted.socket.close()
            sock.settimeout(0)
            established = await secure(sock, context, server_side=True)
            core = HboneConnection(client=False)
            reactor = self.mesh.node.reactor
            tunnel = Tunnel(reactor, sock, established.records, core, self, facts())
            self.tunnels.append(tunnel)
            tunnel.start(established.leftover)

    def on_request(self, tunnel: Tunnel, request) -> None:
        self.note("on_request")
        answer, _, number = self.answers.pop(0).partition(" ")
        request.stream.owner = self
        match answer:
            case "status":
                tunnel.core.respond(request.stream, int(number))
            case "reset":
                tunnel.core.reset(request.stream, int(number))
            case "close":
                self.mesh.node.reactor.deadline(0, tunnel.close)
        tunnel.flush_later()


class Scene:
    def __init__(self, mesh: Mesh, server: ScriptedServer, vip: tuple[str, int]) -> None:
        self.mesh, self.server, self.vip = mesh, server, vip


@asynccontextmanager
async def a_scene(
    *answers: str, identity: Identity | None = None, **config: float
) -> AsyncIterator[Scene]:
    """A client pod of ours, and a peer that follows a script and shows `identity`."""
    async with a_mesh(**config) as mesh:
        client_ip, server_ip = loopback_address(), loopback_address()
        client = a_workload("client", sa="frontend", ips=[client_ip])
        proxy = await mesh.add_proxy(client, hbone=0)
        port = proxy.addresses["outbound"].port
        host = "cart.shop.svc.cluster.local"
        peer = a_workload(
            "server",
            sa="cart",
            ips=[server_ip],
            protocol=TunnelProtocol.HBONE,
            services={f"shop/{host}": {port: 80}},
        )
        mesh.put(
            a_workload("client", sa="frontend", ips=[]),
            peer,
            a_service(host, vips=[client_ip], port_map={port: 80}),
        )
        sock = trio.socket.socket()
        await sock.bind((server_ip, 15008))
        sock.listen(8)
        server = ScriptedServer(mesh, *answers)
        certificate = a_certificate(identity or peer.identity, authority=mesh.authority)
        listener = trio.SocketListener(sock)
        async with listener:
            mesh.nursery.start_soon(server.serve, listener, a_server_context(certificate))
            yield Scene(mesh, server, (client_ip, port))
            for tunnel in server.tunnels:
                tunnel.close()


@pytest.mark.parametrize(
    ("answers", "tunnels"),
    [
        pytest.param(["reset 7", "status 200"], 1, id="a refused stream"),
        pytest.param(["close", "status 200"], 2, id="a lost connection"),
    ],
)
async def test_what_the_peer_did_nothing_with_is_tried_once_more(
    answers: list[str], tunnels: int
) -> None:
    async with a_scene(*answers) as scene:
        async with connect(scene.vip) as stream:
            await scene.server.until("on_request", 2)
            await stream.send_all(b"hello")
            await scene.server.until("on_data")
            assert scene.server.received == b"hello"
            assert len(scene.server.tunnels) == tunnels
            for tunnel in scene.server.tunnels:
                tunnel.close()
            assert await expect_abort(stream) == b""
        [line] = await scene.mesh.lines.wait_for_ends(1)
        assert line.bytes == (5, 0)


@pytest.mark.parametrize(
    ("answers", "text", "reason"),
    [
        (["reset 7", "reset 7"], "h2 failed: stream reset by the peer (code 7)", "h2_error"),
        (["reset 8"], "h2 failed: stream reset by the peer (code 8)", "h2_error"),
        (["status 403"], "http status: 403 Forbidden", "remote_refused"),
        (["status 299"], "http status: 299", "remote_refused"),
        (["silence"], "no answer to CONNECT from the peer within 0.02s", "unreachable"),
    ],
)
async def test_a_connect_that_is_not_granted_is_an_abort_with_one_line(
    answers: list[str], text: str, reason: str
) -> None:
    async with a_scene(*answers, connect_response_seconds=0.02) as scene:
        async with connect(scene.vip) as stream:
            assert await expect_abort(stream) == b""
        [line] = await scene.mesh.lines.wait_for_ends(1)
        assert (line["error"], line["reason"], line["level"]) == (text, reason, "error")
        assert scene.server.answers == []


async def test_whoever_answers_in_anothers_place_is_not_spoken_to() -> None:
    async with a_scene(identity=a_name("bank")) as scene:
        async with connect(scene.vip) as stream:
            assert await expect_abort(stream) == b""
        [line] = await scene.mesh.lines.wait_for_ends(1)
        assert line["reason"] == "identity_mismatch"
        assert "did not present the expected SAN" in line["error"]
        assert scene.server.heard("on_request") == []


async def test_nothing_of_a_handshake_waits_for_the_garbage_collector() -> None:
    """An ssl object takes sixty kibibytes, which no collector sees."""
    kinds = Attempt, Greeting, Handshake, Raising, Securing, TunnelDialling

    def alive() -> list[object]:
        return [one for one in gc.get_objects() if isinstance(one, kinds)]

    async with a_pair() as pair:
        pair.serve(echo)
        gc.collect()
        gc.disable()
        try:
            left_by_others = alive()
            async with await pair.call() as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some(10)
                assert alive() == left_by_others
        finally:
            gc.enable()
