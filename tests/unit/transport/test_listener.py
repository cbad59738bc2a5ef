from __future__ import annotations

import errno
import os
import socket

import pytest
import trio

from tests.support.tunnels import Heard, a_reactor
from ztunnel.transport import listener as module, reactor as reactor_module
from ztunnel.transport.listener import Listener


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    sock.settimeout(0)
    return sock


class Scripted:
    """A listening socket that, asked to accept, first raises what it was told to."""

    def __init__(self, *errors: int) -> None:
        self.real = listening()
        self.errors = list(errors)

    def _accept(self) -> tuple[int, tuple[str, int]]:
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return self.real._accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


async def test_each_connection_is_handed_over_with_its_peer() -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        door = Listener(reactor, listening(), heard.ended, component="inbound")
        with socket.create_connection(door.sock.getsockname()) as caller:
            sock, peer = await heard.until("ended")
            assert str(peer) == "{}:{}".format(*caller.getsockname())
            assert sock.gettimeout() == 0
            sock.close()
        assert str(door.address) == "{}:{}".format(*door.sock.getsockname())
        door.close()


async def test_a_crowd_is_taken_in_turns_and_nobody_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(module, "ACCEPTS_PER_TURN", 2)
    async with a_reactor() as reactor:
        heard = Heard()
        sock = listening()
        callers = [socket.create_connection(sock.getsockname()) for _ in range(7)]
        door = Listener(reactor, sock, heard.ended, component="inbound")
        await heard.until("ended", 7)
        for accepted, _ in heard.heard("ended"):
            accepted.close()
        for caller in callers:
            caller.close()
        door.close()


async def test_whoever_waits_at_the_end_is_still_taken() -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        door = Listener(reactor, listening(), heard.ended, component="inbound")
        callers = [socket.create_connection(door.sock.getsockname()) for _ in range(7)]
        door.finish()  # the reactor has not had a turn
        assert len(heard.heard("ended")) == 7
        for accepted, _ in heard.heard("ended"):
            accepted.sendall(b"?")
            accepted.close()
        for caller in callers:
            with caller:
                assert caller.recv(1) == b"?"


async def test_a_bug_at_the_end_closes_the_door_nevertheless() -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    async with a_reactor() as reactor:
        door = Listener(reactor, listening(), broken, component="inbound")
        with socket.create_connection(door.sock.getsockname()) as caller:
            door.finish()
            assert caller.recv(1) == b""
        assert door.sock.fileno() < 0


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_out_of_resources_it_pauses_longer_and_longer_and_then_goes_on(
    code: int, monkeypatch
) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(module, "BACK_OFF_FIRST_SECONDS", 0.002)
    async with a_reactor() as reactor:
        heard = Heard()
        scripted = Scripted(code, code)
        door = Listener(reactor, scripted, heard.ended, component="inbound")  # type: ignore[arg-type]
        with socket.create_connection(scripted.real.getsockname()):
            sock, _ = await heard.until("ended")
            sock.close()
        assert door.pauses == 2
        door.close()


async def test_while_it_pauses_it_does_not_try(monkeypatch) -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        scripted = Scripted(*[errno.EMFILE] * 100)
        door = Listener(reactor, scripted, heard.ended, component="inbound")  # type: ignore[arg-type]
        callers = [socket.create_connection(scripted.real.getsockname()) for _ in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        assert door.pauses == 1
        assert heard.calls == []
        door.close()
        for caller in callers:
            caller.close()


async def test_a_connection_that_failed_in_the_queue_is_skipped() -> None:
    async with a_reactor() as reactor:
        heard = Heard()
        scripted = Scripted(errno.ECONNABORTED, errno.ENETDOWN)
        door = Listener(reactor, scripted, heard.ended, component="inbound")  # type: ignore[arg-type]
        with socket.create_connection(scripted.real.getsockname()):
            sock, _ = await heard.until("ended")
            sock.close()
        assert door.pauses == 0
        door.close()


async def test_a_connection_that_cannot_be_served_is_closed_and_the_next_one_is_served() -> None:
    async with a_reactor() as reactor:
        heard = Heard()

        def served(sock: socket.socket, peer: object) -> None:
            if not heard.calls:
                heard.note("failed")
                raise RuntimeError("a bug")
            heard.note("served", sock)

        sock = listening()
        door = Listener(reactor, sock, served, component="inbound")
        with socket.create_connection(sock.getsockname()) as first:
            await heard.until("failed")
            first.settimeout(5)
            assert first.recv(1) == b""
            with socket.create_connection(sock.getsockname()):
                (accepted,) = await heard.until("served")
                accepted.close()
        door.close()


async def test_closed_it_gives_the_port_back() -> None:
    async with a_reactor() as reactor:
        door = Listener(reactor, listening(), Heard().ended, component="inbound")
        address = door.sock.getsockname()
        door.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
