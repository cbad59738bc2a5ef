"""Frames by hand through mutual TLS, right and wrong ones, after the manner of h2spec."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from h2.errors import ErrorCodes

from tests.support import peers
from tests.support.h2_cases import (
    ANSWERED,
    CONNECT,
    GREETING,
    ON_IDLE,
    ON_OPEN,
    REFUSED,
    STRANGE_GREETINGS,
    UNANSWERED,
    Case,
    request,
)
from tests.support.mesh import a_pod, credentials, running_mesh
from tests.support.raw_hbone import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    RST_STREAM,
    SETTINGS,
    RawPeer,
    block,
    client_context,
    frame,
    number,
    server_context,
)
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [pytest.mark.netns, pytest.mark.interop]

CART, RAW = "10.244.1.10", "10.244.2.10"
RAW_ID = "spiffe://cluster.local/ns/shop/sa/raw"
ECHO, SILENT = 8080, 8081
FIRST_PORT = 9000  # and up: one port for each thing that the server by hand does
AT_ONCE = 8
OK = frame(HEADERS, END_HEADERS, 1, block([(":status", "200")]))


def pods() -> list[object]:
    return [a_pod("cart", CART), a_pod("raw", RAW, node="node-b", nativeTunnel=True)]


async def silent(_stream: trio.SocketStream) -> None:
    """Read nothing, so that what is sent fills windows, and say nothing."""
    await trio.sleep_forever()


@asynccontextmanager
async def a_mesh(folder: Path) -> AsyncIterator[tuple[DevMesh, trio.Nursery]]:
    async with running_mesh(folder, pods()) as mesh, trio.open_nursery() as nursery:
        for port, application in ((ECHO, peers.echo), (SILENT, silent)):
            listener = await mesh.listen(mesh.pods["cart"], port)
            await nursery.start(peers.serve, application, listener)
        with trio.fail_after(40):
            yield mesh, nursery
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def a_client(mesh: DevMesh, context: ssl.SSLContext) -> AsyncIterator[RawPeer]:
    """Connect by hand to the tunnel port of our pod; nothing has been sent."""
    stream = await mesh.connect(mesh.pods["raw"], CART, 15008)
    peer = await RawPeer.connect(stream, context)
    try:
        yield peer
    finally:
        await peer.aclose()


async def accepted(peer: RawPeer, fields: list[tuple[str, str]] = CONNECT) -> None:
    """Open stream 1 and see it accepted."""
    await peer.send(GREETING + frame(SETTINGS, ACK) + request(fields=fields))
    answer = await peer.until(HEADERS)
    assert peer.fields(answer.payload)[":status"] == "200"


# Our server.


@pytest.mark.parametrize(
    ("cases", "greeting", "opens"),
    [
        pytest.param(STRANGE_GREETINGS, b"", False, id="instead of a greeting"),
        pytest.param(ON_IDLE, GREETING, False, id="with no stream"),
        pytest.param(ON_OPEN, b"", True, id="with a stream"),
    ],
)
async def test_our_server_answers_what_is_wrong_with_the_right_error(
    tmp_path: Path, cases: list[Case], greeting: bytes, *, opens: bool
) -> None:
    outcomes: dict[str, str] = {}
    places = trio.CapacityLimiter(AT_ONCE)

    async def try_out(mesh: DevMesh, context: ssl.SSLContext, case: Case) -> None:
        async with places, a_client(mesh, context) as peer:
            if opens:
                await accepted(peer)
            outcomes[case.name] = await peer.verdict(greeting + case.data)

    async with a_mesh(tmp_path) as (mesh, _):
        context = client_context(credentials(mesh, RAW_ID), tmp_path)
        async with trio.open_nursery() as nursery:
            for case in cases:
                nursery.start_soon(try_out, mesh, context, case)
        assert outcomes == {case.name: case.outcome for case in cases}
        # It is as well as before.
        async with a_client(mesh, context) as peer:
            await accepted(peer)
            assert await peer.verdict(b"") == "tolerated"
        proxy = mesh.proxies["node-a"]
        assert proxy.process.returncode is None
        assert not [line for line in proxy.lines.all if "internal" in line or "unexpected" in line]


async def test_our_server_refuses_with_a_status_and_ends_the_stream(tmp_path: Path) -> None:
    answers: dict[str, dict[str, str]] = {}
    async with a_mesh(tmp_path) as (mesh, _):
        context = client_context(credentials(mesh, RAW_ID), tmp_path)
        for case in REFUSED:
            async with a_client(mesh, context) as peer:
                await peer.send(GREETING + case.data)
                answer = await peer.until(HEADERS)
                assert answer.flags & END_STREAM
                answers[case.name] = peer.fields(answer.payload)
    assert answers == {case.name: {":status": case.outcome} for case in REFUSED}


async def test_our_server_takes_frames_cut_anywhere_padding_and_an_early_body(
    tmp_path: Path,
) -> None:
    content = peers.random_bytes(60_000, seed=1)
    to_echo = [(":method", "CONNECT"), (":authority", f"{CART}:{ECHO}")]
    early = request(fields=to_echo) + b"".join(
        frame(DATA, PADDED, 1, bytes([pad]) + content[at : at + 1000] + bytes(pad))
        for pad, at in enumerate(range(0, len(content), 1000))
    )
    wire = GREETING + frame(SETTINGS, ACK) + early + frame(DATA, END_STREAM, 1)
    received = bytearray()
    async with a_mesh(tmp_path) as (mesh, _):
        context = client_context(credentials(mesh, RAW_ID), tmp_path)
        async with a_client(mesh, context) as peer:
            head, rest = wire[:300], wire[300:]
            for byte in head:
                await peer.send(bytes([byte]))  # each in a TLS record of its own
            await peer.send(rest)
            ended = False
            while not ended:
                each = await peer.until(DATA)
                received += each.payload
                ended = bool(each.flags & END_STREAM)
        assert bytes(received) == content
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", RAW_ID)
        assert "bytes_sent=60000 bytes_recv=60000" in line
        assert "error=" not in line


# Our client.


class Server:
    """A server by hand: `plans` say what it does with stream 1 of a connection, by its port."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.cases: dict[int, tuple[Case, bool]] = {}
        self.outcomes: dict[str, str] = {}
        self.connections = 0
        self.finished = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one connection: open it, then do what the port of the authority stands for."""
        peer = await RawPeer.accept(stream, self.context)
        await peer.send(frame(SETTINGS) + frame(SETTINGS, ACK))
        asked = await peer.until(HEADERS)
        self.connections += 1
        port = int(peer.fields(asked.payload)[":authority"].rpartition(":")[2])
        await self.act(peer, port)
        await peer.aclose()

    async def act(self, peer: RawPeer, port: int) -> None:
        case, answers = self.cases[port]
        outcome = await peer.verdict((OK if answers else b"") + case.data)
        self.outcomes.setdefault(case.name, outcome)


@asynccontextmanager
async def our_client_calling(
    server_type: type[Server], folder: Path
) -> AsyncIterator[tuple[DevMesh, Server]]:
    async with a_mesh(folder) as (mesh, nursery):
        server = server_type(server_context(credentials(mesh, RAW_ID), folder))
        listener = await mesh.listen(mesh.pods["raw"], 15008)
        await nursery.start(peers.serve, server.serve, listener)
        yield mesh, server


async def how_a_call_ends(mesh: DevMesh, port: int) -> str:
    """Call the server by hand, wait for the end of the connection, and give its kind."""
    try:
        async with await mesh.connect(mesh.pods["cart"], RAW, port) as stream:
            while await stream.receive_some():
                pass
    except (trio.BrokenResourceError, ConnectionResetError):  # the latter within the connect
        return "abort"
    return "end"


async def test_our_client_answers_what_is_wrong_with_the_right_error(tmp_path: Path) -> None:
    plans = [*((case, False) for case in UNANSWERED), *((case, True) for case in ANSWERED)]
    async with our_client_calling(Server, tmp_path) as (mesh, server):
        server.cases = dict(enumerate(plans, FIRST_PORT))
        for port in server.cases:
            await how_a_call_ends(mesh, port)
        assert server.outcomes == {case.name: case.outcome for case, _ in plans}
        proxy = mesh.proxies["node-a"]
        assert proxy.process.returncode is None
        assert not [line for line in proxy.lines.all if "internal" in line or "unexpected" in line]


class Resetting(Server):
    """It accepts every stream and resets it with the error its port stands for."""

    async def act(self, peer: RawPeer, port: int) -> None:
        await peer.verdict(OK + frame(RST_STREAM, 0, 1, number(port - FIRST_PORT)))


async def test_a_stream_that_is_reset_aborts_the_application_unless_without_error(
    tmp_path: Path,
) -> None:
    async with our_client_calling(Resetting, tmp_path) as (mesh, _):
        ends = {code: await how_a_call_ends(mesh, FIRST_PORT + code) for code in ErrorCodes}
        assert ends == {code: "abort" if code else "end" for code in ErrorCodes}
        lines = mesh.proxies["node-a"].lines
        for code in list(ErrorCodes)[1:]:
            line = await lines.wait_for("connection complete", f"{RAW}:{FIRST_PORT + code}")
            assert f"peer reset the stream (code {int(code)})" in line


class Leaving(Server):
    """It says of the first stream that it never looked at it; the next connection it serves."""

    async def act(self, peer: RawPeer, port: int) -> None:
        if self.connections == 1:
            await peer.verdict(frame(GOAWAY, payload=bytes(8)))
            return
        await peer.send(OK)
        ended = False
        while not ended:
            each = await peer.until(DATA)
            ended = bool(each.flags & END_STREAM)
            await peer.send(frame(DATA, each.flags, 1, each.payload))
        await self.finished.wait()


async def test_a_stream_that_goaway_gives_back_is_tried_on_a_new_connection(
    tmp_path: Path,
) -> None:
    async with our_client_calling(Leaving, tmp_path) as (mesh, server):
        async with await mesh.connect(mesh.pods["cart"], RAW, ECHO) as stream:
            await stream.send_all(b"once more")
            await stream.send_eof()
            assert await peers.read_to_end(stream) == b"once more"
        server.finished.set()
        assert server.connections == 2
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", f"{RAW}:{ECHO}")
        assert "error=" not in line
