from __future__ import annotations

import socket
import struct

import pytest
import trio

from tests.support.tunnels import Heard, a_reactor, open_descriptors
from ztunnel.transport import reactor as reactor_module
from ztunnel.transport.dial import Dial
from ztunnel.transport.reactor import Reactor


def listening(backlog: int = 16) -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(backlog)
    return sock


def begin(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(0)
    sock.connect_ex(address)
    return sock


def let_go(reactor: Reactor, sock: socket.socket) -> None:
    reactor.forget(sock)
    sock.close()


async def test_a_connect_that_succeeds_is_handed_over_still_in_the_reactor() -> None:
    with listening() as server:
        async with a_reactor() as reactor:
            heard = Heard()
            Dial(reactor, begin(server.getsockname()), heard)
            (sock,) = await heard.until("on_connected")
            assert sock.getpeername() == server.getsockname()
            assert len(reactor) == 1
            let_go(reactor, sock)


async def test_a_refused_connect_says_what_the_kernel_said() -> None:
    with listening() as server:
        address = server.getsockname()
    before = open_descriptors()
    async with a_reactor() as reactor:
        within = open_descriptors()
        heard = Heard()
        Dial(reactor, begin(address), heard)
        (error,) = await heard.until("on_unreachable")
        assert str(error) == "Connection refused (os error 111)"
        assert open_descriptors() == within
    assert open_descriptors() == before


@pytest.fixture
def black_hole():
    """An address whose queue is full, so that the kernel drops every SYN."""
    with listening(0) as server:
        fillers = [begin(server.getsockname()) for _ in range(2)]
        yield server.getsockname()
        for filler in fillers:
            filler.close()


async def test_a_connect_that_nobody_answers_times_out_once(black_hole, monkeypatch) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.001)
    async with a_reactor() as reactor:
        heard = Heard()
        Dial(reactor, begin(black_hole), heard, seconds=0.01)
        (error,) = await heard.until("on_unreachable")
        assert str(error) == "connection timed out"
        await trio.testing.wait_all_tasks_blocked()
        assert len(heard.calls) == 1


async def test_a_cancelled_dial_says_nothing_and_leaves_nothing(black_hole, monkeypatch) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.001)
    async with a_reactor() as reactor:
        heard = Heard()
        before = open_descriptors()
        dial = Dial(reactor, begin(black_hole), heard, seconds=0.005)
        dial.cancel()
        dial.cancel()
        assert (len(reactor), open_descriptors()) == (0, before)
        later = Heard()
        reactor.deadline(0.01, later.ended)
        await later.until("ended")
        assert heard.calls == []


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_a_peer_that_answered_and_reset_at_once_has_its_answer_read_and_then_its_reset() -> (
    None
):
    with listening() as server:
        async with a_reactor() as reactor:
            heard = Heard()
            sock = begin(server.getsockname())
            accepted, _ = server.accept()
            accepted.send(b"go away")
            reset(accepted)
            Dial(reactor, sock, heard)
            assert await heard.until("on_connected") == (sock,)
            assert sock.recv(100) == b"go away"
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
            let_go(reactor, sock)


async def test_a_peer_that_reset_at_once_without_a_word_was_not_reached() -> None:
    with listening() as server:
        async with a_reactor() as reactor:
            heard = Heard()
            sock = begin(server.getsockname())
            reset(server.accept()[0])
            Dial(reactor, sock, heard)
            (error,) = await heard.until("on_unreachable")
            assert str(error) == "Connection reset by peer (os error 104)"


async def test_a_peer_that_answered_and_finished_at_once_is_connected() -> None:
    with listening() as server:
        async with a_reactor() as reactor:
            heard = Heard()
            sock = begin(server.getsockname())
            server.accept()[0].close()
            Dial(reactor, sock, heard)
            await heard.until("on_connected")
            assert sock.recv(1) == b""
            let_go(reactor, sock)


async def test_a_bug_of_ours_is_told_to_the_dialler(black_hole) -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        Dial(reactor, begin(black_hole), heard).fail(RuntimeError("a bug"))
        (error,) = await heard.until("on_unreachable")
        assert str(error) == "internal error: a bug"
