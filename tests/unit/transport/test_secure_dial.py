from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing

from tests.support.certs import a_certificate, a_client_context, a_name, a_server_context
from tests.support.handshakes import secure
from tests.support.tunnels import Heard, a_permit, a_reactor, open_descriptors, socket_pair
from ztunnel.errors import PeerIdentityError, PeerTimeoutError, TlsError, UnreachableError
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint
from ztunnel.transport import secure_dial
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.secure_dial import INNER, Plan, Raising, raise_tunnel
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.hbone.settings import HboneSettings

CART, BANK = a_name("cart"), a_name("bank")
CLIENT = a_client_context()
SERVER = a_server_context(a_certificate(CART))
NOWHERE = Endpoint.parse("192.0.2.1:15008")
SOCKETS = SocketFactory(netns=None, mark=None, keepalive=None)


def listening(backlog: int = 16) -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(backlog)
    return sock


def a_plan(reactor: Reactor, *expected: Identity, remote: Endpoint = INNER) -> Plan:
    return Plan(
        reactor=reactor,
        context=CLIENT,
        expected=expected or (CART,),
        owner=Heard(),
        settings=HboneSettings(),
        remote=remote,
    )


def reach(reactor: Reactor, peer: Endpoint) -> tuple[Raising, Heard]:
    """Begin to make a tunnel to `peer`."""
    heard = Heard()
    sock = SOCKETS.dial(a_permit(), peer)
    raising = Raising(a_plan(reactor, remote=peer), sock, heard)
    raising.connect()
    return raising, heard


async def test_a_tunnel_is_made_from_the_connect_on() -> None:
    with listening() as server:
        peer = Endpoint.of(server.getsockname())
        async with a_reactor() as reactor, trio.open_nursery() as nursery:
            _, heard = reach(reactor, peer)
            await trio.lowlevel.wait_readable(server)
            theirs, _ = server.accept()
            theirs.settimeout(0)
            nursery.start_soon(partial(secure, theirs, SERVER, server_side=True))
            tunnel, seconds = await heard.until("on_raised")
            assert seconds > 0
            assert (tunnel.facts.peer, tunnel.facts.remote) == (CART, peer)
            assert tunnel.facts.local == Endpoint.of(theirs.getpeername())
            tunnel.close()
        theirs.close()


async def test_a_peer_that_refuses_is_unreachable() -> None:
    with listening() as server:
        peer = Endpoint.of(server.getsockname())
    before = open_descriptors()
    async with a_reactor() as reactor:
        within = open_descriptors()
        _, heard = reach(reactor, peer)
        (error,) = await heard.until("on_not_raised")
        assert isinstance(error, UnreachableError)
        assert "Connection refused" in str(error)
        assert open_descriptors() == within
    assert open_descriptors() == before


@pytest.fixture
def black_hole():
    """An address whose queue is full, so that the kernel drops every SYN."""
    with listening(0) as server:
        fillers = [socket.socket() for _ in range(2)]
        for filler in fillers:
            filler.settimeout(0)
            filler.connect_ex(server.getsockname())
        yield Endpoint.of(server.getsockname())
        for filler in fillers:
            filler.close()


async def test_a_peer_that_is_silent_is_blamed_on_network_policy(black_hole, monkeypatch) -> None:
    monkeypatch.setattr(secure_dial, "CONNECT_SECONDS", 0.01)
    before = open_descriptors()
    async with a_reactor() as reactor:
        _, heard = reach(reactor, black_hole)
        (error,) = await heard.until("on_not_raised")
        assert isinstance(error, PeerTimeoutError)
        assert f"maybe a NetworkPolicy is blocking HBONE port {black_hole.port}" in str(error)
    assert open_descriptors() == before


async def test_a_cancelled_dial_leaves_no_socket_and_says_nothing(black_hole) -> None:
    before = open_descriptors()
    async with a_reactor() as reactor:
        raising, heard = reach(reactor, black_hole)
        for _ in range(2):
            raising.cancel()
        assert len(reactor) == 0
        assert heard.calls == []
    assert open_descriptors() == before


async def test_a_cancelled_handshake_leaves_no_socket() -> None:
    ours, theirs = socket_pair()
    async with a_reactor() as reactor:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(raise_tunnel, a_plan(reactor), ours)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert ours.fileno() == -1
        assert len(reactor) == 0
    theirs.close()


async def test_a_tunnel_is_raised_to_whom_we_expect() -> None:
    ours, theirs = socket_pair()
    async with a_reactor() as reactor, trio.open_nursery() as nursery:
        nursery.start_soon(partial(secure, theirs, SERVER, server_side=True))
        tunnel = await raise_tunnel(a_plan(reactor, BANK, CART), ours)
        assert tunnel.facts.peer == CART
        assert tunnel.facts.remote is INNER
        assert tunnel.facts.version == "TLSv1.3"
        tunnel.close()
    theirs.close()


async def test_whoever_else_answers_is_sent_away_before_a_byte_of_http() -> None:
    ours, theirs = socket_pair()
    async with a_reactor() as reactor, trio.open_nursery() as nursery:
        done = []
        finished = trio.Event()

        async def server() -> None:
            done.append(await secure(theirs, SERVER, server_side=True))
            finished.set()

        nursery.start_soon(server)
        with pytest.raises(PeerIdentityError, match="did not present the expected SAN"):
            await raise_tunnel(a_plan(reactor, BANK), ours)
        assert ours.fileno() == -1
        with trio.fail_after(5):
            await finished.wait()
        sealed = memoryview(done[0].leftover or theirs.recv(1000))
        out = memoryview(bytearray(2000))
        with pytest.raises(TlsError, match="bad certificate"):
            done[0].records.open(sealed, out)
    theirs.close()


async def test_a_handshake_that_fails_closes_the_socket() -> None:
    ours, theirs = socket_pair()
    theirs.close()
    async with a_reactor() as reactor:
        with pytest.raises(TlsError):
            await raise_tunnel(a_plan(reactor), ours)
    assert ours.fileno() == -1


async def test_a_peer_that_resets_after_the_handshake_is_an_error_of_that_peer_only() -> None:
    ours, theirs = socket_pair()

    async def server() -> None:
        with suppress(TlsError):  # it may see the end before it has seen all of the handshake
            await secure(theirs, SERVER, server_side=True)

    class Hasty(socket.socket):
        """Reset by its peer the moment its name is asked for."""

        def getsockname(self):
            raise OSError(107, "Transport endpoint is not connected")

    hasty = Hasty(fileno=ours.detach())
    hasty.settimeout(0)
    async with a_reactor() as reactor, trio.open_nursery() as nursery:
        nursery.start_soon(server)
        with pytest.raises(TlsError, match="not connected"):
            await raise_tunnel(a_plan(reactor, remote=NOWHERE), hasty)
    assert hasty.fileno() == -1
    theirs.close()


async def test_a_tunnel_within_a_tunnel_has_no_addresses() -> None:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(0)
    async with a_reactor() as reactor, trio.open_nursery() as nursery:
        nursery.start_soon(partial(secure, theirs, SERVER, server_side=True))
        tunnel = await raise_tunnel(a_plan(reactor), ours)
        assert tunnel.facts.local == tunnel.facts.remote == INNER
        tunnel.close()
    theirs.close()
