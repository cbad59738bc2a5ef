from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from tests.support.tunnels import CONTEXTS, open_descriptors, socket_pair
from ztunnel.errors import TlsError, UnreachableError
from ztunnel.tls.handshake import Established
from ztunnel.transport.handshake import connected, secure

CLIENT, SERVER = CONTEXTS[True]
OUT = memoryview(bytearray(1 << 16))


async def test_two_ends_agree_over_real_sockets_and_the_sockets_stay_ours() -> None:
    one, other = socket_pair()
    found: dict[bool, Established] = {}

    async def side(sock: socket.socket, *, server_side: bool) -> None:
        context = SERVER if server_side else CLIENT
        found[server_side] = await secure(sock, context, server_side=server_side)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: side(one, server_side=False))
            nursery.start_soon(lambda: side(other, server_side=True))
    sealed = memoryview(bytes(found[False].records.seal_small(b"hello")))
    assert found[True].records.open(sealed, OUT) == (len(sealed), 5)
    for sock in (one, other):
        sock.close()


async def test_an_alert_is_sent_to_whoever_does_not_speak_tls() -> None:
    ours, theirs = socket_pair()
    theirs.send(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TlsError):
        await secure(ours, SERVER, server_side=True)
    assert theirs.recv(100)[0] == 21  # RFC 8446 s5.1: the content type of an alert
    for sock in (ours, theirs):
        sock.close()


@pytest.mark.parametrize("how", ["finishes", "resets"])
async def test_a_peer_that_leaves_in_the_middle_is_an_error(how: str) -> None:
    ours, theirs = socket_pair()
    if how == "resets":
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    theirs.close()
    with pytest.raises(TlsError, match="tls handshake error: "):
        await secure(ours, SERVER, server_side=True)
    ours.close()


async def test_a_cancelled_handshake_leaves_nothing() -> None:
    before = open_descriptors()
    ours, theirs = socket_pair()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: secure(ours, SERVER, server_side=True))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert ours.fileno() >= 0
    for sock in (ours, theirs):
        sock.close()
    assert open_descriptors() == before


async def test_a_connect_under_way_is_waited_for() -> None:
    with socket.socket() as server, socket.socket() as sock:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        sock.settimeout(0)
        sock.connect_ex(server.getsockname())
        with trio.fail_after(5):
            await connected(sock)
        assert sock.getpeername() == server.getsockname()


async def test_a_connect_that_fails_says_what_the_kernel_said() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = server.getsockname()
    with socket.socket() as sock:
        sock.settimeout(0)
        sock.connect_ex(address)
        with pytest.raises(UnreachableError, match=r"Connection refused \(os error 111\)"):
            await connected(sock)
