from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from tests.support.tunnels import CONTEXTS, Heard, a_reactor, open_descriptors, socket_pair
from ztunnel.errors import TlsError
from ztunnel.tls.handshake import Handshake
from ztunnel.transport.reactor import READABLE, Reactor
from ztunnel.transport.securing import Securing

CLIENT, SERVER = CONTEXTS[True]
OUT = memoryview(bytearray(1 << 16))


class Party(Heard):
    """The owner of one end."""

    def __init__(self, reactor: Reactor, sock: socket.socket, *, server_side: bool) -> None:
        super().__init__()
        self.sock = sock
        self.handshake = Handshake(SERVER if server_side else CLIENT, server_side=server_side)
        self.securing = Securing(reactor, sock, self.handshake, self)
        self.securing.start()


def reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))


async def test_two_ends_agree_and_the_last_flight_waits_for_what_comes_behind_it() -> None:
    async with a_reactor() as reactor:
        one, other = socket_pair()
        client = Party(reactor, one, server_side=False)
        server = Party(reactor, other, server_side=True)
        ours, unsent = await client.until("on_secured")
        await trio.testing.wait_all_tasks_blocked()
        assert unsent
        assert not server.heard("on_secured"), "the server has not heard the client's last words"
        one.send(unsent + ours.records.seal_small(b"hello"))
        theirs, nothing = await server.until("on_secured")
        assert nothing == b""
        leftover = memoryview(theirs.leftover)
        assert theirs.records.open(leftover, OUT) == (len(leftover), 5)
        assert len(reactor) == 2, "the sockets are their owners' to take over"
        for sock in (one, other):
            reactor.forget(sock)
            sock.close()


async def test_its_new_owner_learns_of_what_came_behind_the_handshake() -> None:
    class Taker(Party):
        def on_secured(self, *arguments: object) -> None:
            reactor.register(self.sock, self)
            self.note("on_secured", *arguments)

        def fail(self, error: Exception) -> None:
            raise error

    async with a_reactor() as reactor:
        one, other = socket_pair()
        client = Party(reactor, one, server_side=False)
        server = Taker(reactor, other, server_side=True)
        ours, unsent = await client.until("on_secured")
        sealed = ours.records.seal_small(bytes(100_000))
        one.send(unsent + sealed)
        await server.until("on_secured")
        (events,) = await server.until("on_event")
        assert events & READABLE
        assert other.recv(1)
        for sock in (one, other):
            reactor.forget(sock)
            sock.close()


async def test_an_alert_is_sent_to_whoever_does_not_speak_tls() -> None:
    async with a_reactor() as reactor:
        ours, theirs = socket_pair()
        party = Party(reactor, ours, server_side=True)
        theirs.send(b"GET / HTTP/1.1\r\n\r\n")
        (error,) = await party.until("on_insecure")
        assert isinstance(error, TlsError)
        assert theirs.recv(100)[0] == 21  # RFC 8446 s5.1: the content type of an alert
        assert (ours.fileno(), len(reactor)) == (-1, 0)
        theirs.close()


@pytest.mark.parametrize("how", ["finishes", "resets"])
async def test_a_peer_that_leaves_in_the_middle_is_an_error(how: str) -> None:
    async with a_reactor() as reactor:
        ours, theirs = socket_pair()
        party = Party(reactor, ours, server_side=True)
        if how == "resets":
            reset_on_close(theirs)
        theirs.close()
        (error,) = await party.until("on_insecure")
        assert str(error).startswith("tls handshake error: ")
        assert ours.fileno() == -1


async def test_who_cancels_hears_nothing_and_nothing_is_left() -> None:
    before = open_descriptors()
    async with a_reactor() as reactor:
        ours, theirs = socket_pair()
        party = Party(reactor, ours, server_side=True)
        party.securing.cancel()
        party.securing.cancel()
        party.securing.fail(RuntimeError("too late"))
        theirs.close()
        await trio.testing.wait_all_tasks_blocked()
        assert party.calls == []
        assert len(reactor) == 0
    assert open_descriptors() == before


async def test_a_bug_reaches_the_owner_once() -> None:
    async with a_reactor() as reactor:
        ours, theirs = socket_pair()
        party = Party(reactor, ours, server_side=True)
        bug = RuntimeError("a bug")
        for _ in range(2):
            party.securing.fail(bug)
        assert party.calls == [("on_insecure", (bug,))]
        assert ours.fileno() == -1
        theirs.close()
