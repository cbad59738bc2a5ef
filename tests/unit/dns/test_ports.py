from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import dns.message
import pytest
import trio
import trio.testing

from tests.support.resolvers import answered
from tests.support.tunnels import open_descriptors
from ztunnel.dns import ports as module
from ztunnel.dns.ports import Kept, OpenPort, Ports
from ztunnel.model.network import Endpoint
from ztunnel.transport.reactor import READABLE, WRITABLE, Reactor
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire import dns as wire

OURS = SocketFactory(netns=None, mark=None, keepalive=None)
MESSAGE = dns.message.make_query("example.org", "A", id=4711).to_wire()
QUESTION = MESSAGE[12:]


class Asked:
    """A query that waits."""

    def __init__(self) -> None:
        self.question = QUESTION
        self.answers: list[bytes] = []
        self.errors: list[OSError] = []
        self.news = trio.Event()
        self.port: OpenPort | None = None
        self.number = 0

    def answered(self, data: bytes) -> None:
        self.answers.append(data)
        self._leave()

    def refused(self, port: OpenPort, error: OSError) -> None:
        self.errors.append(error)
        self._leave()

    def forget(self) -> None:
        self.answered(b"forgotten")

    def _leave(self) -> None:
        if self.port is not None:
            self.port.leave(self.number)
        self.news.set()


class Scene:
    """One resolver, whose socket the test reads and writes."""

    def __init__(self, resolver: socket.socket, reactor: Reactor, kept: Kept) -> None:
        self.resolver = resolver
        self.kept = kept
        self.ports = Ports(
            Endpoint.of(resolver.getsockname()),
            sockets=OURS, reactor=reactor, ids=random.Random(1), kept=kept,
        )  # fmt: skip

    def ask(self) -> Asked:
        asked = Asked()
        asked.port, asked.number = self.ports.send(MESSAGE, asked)
        return asked

    def hears(self) -> tuple[bytes, tuple[str, int]]:
        data, sender = self.resolver.recvfrom(4096)
        return data, sender

    def answer(self, data: bytes, sender: tuple[str, int]) -> None:
        self.resolver.sendto(answered(data), sender)

    @property
    def open(self) -> int:
        return len(self.ports._open)


@pytest.fixture
def resolver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@asynccontextmanager
async def a_scene(resolver: socket.socket) -> AsyncIterator[Scene]:
    reactor = Reactor()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        scene = Scene(resolver, reactor, Kept())
        try:
            yield scene
        finally:
            scene.ports.close()
            nursery.cancel_scope.cancel()


async def happened(asked: Asked) -> None:
    with trio.fail_after(5):
        await asked.news.wait()


async def test_answers_find_who_waits_by_port_and_id(resolver: socket.socket) -> None:
    async with a_scene(resolver) as scene:
        waiting = [scene.ask() for _ in range(5)]
        heard = [scene.hears() for _ in waiting]
        for data, sender in reversed(heard):
            scene.answer(data, sender)
        for asked, (data, _) in zip(waiting, heard, strict=True):
            await happened(asked)
            assert asked.answers == [answered(data)]
            assert asked.number == wire.message_id_of(data)


async def test_who_asks_seldom_has_a_port_for_each_query(resolver: socket.socket) -> None:
    async with a_scene(resolver) as scene:
        for _ in range(module.PORTS_PER_SERVER):
            scene.ask()
        senders = {scene.hears()[1] for _ in range(module.PORTS_PER_SERVER)}
    assert len(senders) == module.PORTS_PER_SERVER


async def test_who_asks_a_lot_shares_ports_and_none_has_many_queries(
    resolver: socket.socket,
) -> None:
    senders: dict[tuple[str, int], int] = {}
    async with a_scene(resolver) as scene:
        for _ in range(1000):
            asked = scene.ask()
            data, sender = scene.hears()
            senders[sender] = senders.get(sender, 0) + 1
            asked.answered(answered(data))
            assert scene.kept.ports <= module.PORTS_PER_SERVER
            assert scene.open <= module.PORTS_PER_SERVER
    assert 1000 / module.PORT_QUERIES_MAX <= len(senders) < 100
    assert max(senders.values()) == module.PORT_QUERIES_MAX


async def test_a_datagram_nobody_waits_for_ends_the_use_of_its_port(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_PER_SERVER", 1)
    async with a_scene(resolver) as scene:
        first = scene.ask()
        data, sender = scene.hears()
        guess = wire.with_id(answered(data), wire.message_id_of(data) ^ 1)
        resolver.sendto(guess, sender)
        while scene.kept.ports:
            await trio.testing.wait_all_tasks_blocked(0.01)
        second = scene.ask()
        assert second.port is not first.port
        # Who waits there still waits.
        scene.answer(data, sender)
        await happened(first)
        assert first.answers == [answered(data)]
        assert scene.open == 1


@pytest.mark.parametrize("junk", [b"", b"\0", b"\0" * 11, MESSAGE, answered(MESSAGE)])
async def test_junk_is_no_answer(resolver: socket.socket, junk: bytes) -> None:
    async with a_scene(resolver) as scene:
        asked = scene.ask()
        data, sender = scene.hears()
        resolver.sendto(junk, sender)
        scene.answer(data, sender)
        await happened(asked)
        assert asked.answers == [answered(data)]


async def test_a_port_is_closed_when_it_is_old(
    resolver: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    async with a_scene(resolver) as scene:
        idle, busy = scene.ask(), scene.ask()
        idle.answered(b"")
        await trio.sleep(module.PORT_SECONDS + 1)
        assert scene.kept.ports == 0
        assert scene.open == 1
        busy.answered(b"")
        assert scene.open == 0


async def test_beyond_what_is_kept_each_query_has_a_port_to_itself(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_KEPT_MAX", 2)
    async with a_scene(resolver) as scene:
        waiting = [scene.ask() for _ in range(5)]
        assert (scene.open, scene.kept.ports) == (5, 2)
        for asked in waiting:
            asked.answered(b"")
        assert scene.open == 2


async def test_all_who_wait_at_a_port_hear_that_the_resolver_is_gone(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_PER_SERVER", 1)
    async with a_scene(resolver) as scene:
        first = scene.ask()
        resolver.close()
        second = scene.ask()
        for asked in (first, second):
            await happened(asked)
            assert isinstance(asked.errors[0], ConnectionRefusedError)
        assert scene.open == 0


async def test_old_news_of_a_port_does_not_concern_the_next_query(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_PER_SERVER", 1)

    class Refused(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            raise ConnectionRefusedError(111, "refused")

    async with a_scene(resolver) as scene:
        first = scene.ask()
        assert first.port is not None
        sock = first.port.sock
        first.port.sock = Refused(fileno=sock.detach())
        second = scene.ask()
        assert [type(error) for error in first.errors] == [ConnectionRefusedError]
        assert second.port is not first.port
        scene.hears()
        scene.answer(*scene.hears())
        await happened(second)
        assert second.answers


async def test_a_query_too_long_for_the_network_concerns_no_other(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_PER_SERVER", 1)
    async with a_scene(resolver) as scene:
        first = scene.ask()
        with pytest.raises(OSError, match="too long"):
            scene.ports.send(bytes(70000), Asked())
        assert not first.errors
        data, sender = scene.hears()
        scene.answer(data, sender)
        await happened(first)


async def test_what_cannot_be_sent_at_all_leaves_nothing() -> None:
    before = open_descriptors()
    async with a_scene_of(Endpoint.parse("[fe80::1]:53")) as ports:
        with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
            ports.send(MESSAGE, Asked())
        assert ports.is_idle
    assert open_descriptors() == before


async def test_a_full_buffer_is_as_if_the_query_were_lost(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            raise BlockingIOError

    def connect(sockets: SocketFactory, server: Endpoint) -> socket.socket:
        return Full(socket.AF_INET, socket.SOCK_DGRAM)

    monkeypatch.setattr(module, "connect_datagram", connect)
    async with a_scene(resolver) as scene:
        asked = scene.ask()
        assert asked.port is not None
        assert list(asked.port.waiting) == [asked.number]


async def test_a_second_refusal_to_send_is_the_querys_own(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            raise PermissionError(1, "no")

    def connect(sockets: SocketFactory, server: Endpoint) -> socket.socket:
        return Refusing(socket.AF_INET, socket.SOCK_DGRAM)

    monkeypatch.setattr(module, "connect_datagram", connect)
    async with a_scene(resolver) as scene:
        with pytest.raises(PermissionError):
            scene.ask()
        assert scene.ports.is_idle
        assert scene.kept.ports == 0


async def test_ids_at_one_port_differ(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PORTS_PER_SERVER", 1)
    monkeypatch.setattr(module, "PORT_QUERIES_MAX", 1000)

    class Poor(random.Random):
        """Has four ids only."""

        def getrandbits(self, k: int, /) -> int:
            return super().getrandbits(2)

    async with a_scene(resolver) as scene:
        scene.ports._ids = Poor(1)
        assert {scene.ask().number for _ in range(4)} == {0, 1, 2, 3}


async def test_a_bug_in_one_answer_leaves_the_others(resolver: socket.socket) -> None:
    class Buggy(Asked):
        def answered(self, data: bytes) -> None:
            super().answered(data)
            raise ZeroDivisionError

    async with a_scene(resolver) as scene:
        scene.ports._fresh = []
        buggy = Buggy()
        buggy.port, buggy.number = scene.ports.send(MESSAGE, buggy)
        other = Asked()
        assert buggy.port is not None
        other.port = buggy.port
        other.number = scene.ports._send(buggy.port, 7, MESSAGE, other)
        for _ in range(2):
            scene.answer(*scene.hears())
        await happened(other)
        assert other.answers


async def test_at_the_end_everything_is_closed(resolver: socket.socket) -> None:
    before = open_descriptors()
    async with a_scene(resolver) as scene:
        waiting = [scene.ask() for _ in range(3)]
        scene.ports.close()
        assert [asked.answers for asked in waiting] == [[b"forgotten"]] * 3
        assert scene.kept.ports == scene.open == 0
    assert open_descriptors() == before


@pytest.mark.parametrize("events", [WRITABLE, READABLE])
async def test_an_idle_port_reads_nothing(resolver: socket.socket, events: int) -> None:
    async with a_scene(resolver) as scene:
        asked = scene.ask()
        data, sender = scene.hears()
        asked.answered(b"")
        scene.answer(data, sender)
        assert asked.port is not None
        asked.port.on_event(events)
        assert asked.port.sock.recv(4096) == answered(data)


async def test_a_flood_at_a_port_is_read_in_several_turns(
    resolver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DATAGRAMS_PER_TURN", 2)
    async with a_scene(resolver) as scene:
        asked = scene.ask()
        data, sender = scene.hears()
        for _ in range(7):
            resolver.sendto(b"junk", sender)
        scene.answer(data, sender)
        await happened(asked)


@asynccontextmanager
async def a_scene_of(server: Endpoint) -> AsyncIterator[Ports]:
    reactor = Reactor()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        yield Ports(server, sockets=OURS, reactor=reactor, ids=random.Random(1), kept=Kept())
        nursery.cancel_scope.cancel()
