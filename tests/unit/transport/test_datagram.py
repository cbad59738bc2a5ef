from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.tunnels import open_descriptors
from ztunnel.errors import ConfigError
from ztunnel.model.network import Endpoint
from ztunnel.transport import datagram
from ztunnel.transport.datagram import DatagramListener, SocketAddress
from ztunnel.transport.reactor import READABLE, Reactor
from ztunnel.transport.sockets import SocketFactory

LOOPBACKS = pytest.mark.parametrize("host", ["127.0.0.1:0", "[::1]:0"])
OURS = SocketFactory(netns=None, mark=None, keepalive=None, port_reuse=False)


class Inbox:
    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.arrived = trio.Event()
        self.wanted = 1

    def __call__(self, listener: DatagramListener, data: bytes, sender: SocketAddress) -> None:
        self.messages.append(data)
        if data == b"bug":
            raise ValueError("a bug")
        listener.send(data.upper(), sender)
        if len(self.messages) >= self.wanted:
            self.arrived.set()

    async def filled(self) -> None:
        with trio.fail_after(5):
            await self.arrived.wait()


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        yield sock


@LOOPBACKS
async def test_a_bound_socket_gets_what_is_sent_and_answers(nursery: trio.Nursery, host: str):
    reactor, inbox = Reactor(), Inbox()
    sock = datagram.bind_datagram(OURS, Endpoint.parse(host))
    here = Endpoint.of(sock.getsockname())
    listener = DatagramListener(reactor, sock, inbox)
    assert listener.here == here
    nursery.start_soon(reactor.run)
    with datagram.connect_datagram(OURS, here) as asking:
        asking.send(b"ping")
        await inbox.filled()
        assert asking.recv(10) == b"PING"
    listener.close()
    listener.close()
    assert len(reactor) == 0


async def test_more_than_a_turn_allows_comes_in_later_turns(
    nursery: trio.Nursery, client: socket.socket
):
    reactor, inbox = Reactor(), Inbox()
    inbox.wanted = 3 * datagram.DATAGRAMS_PER_TURN
    sock = datagram.bind_datagram(OURS, Endpoint.parse("127.0.0.1:0"))
    for number in range(inbox.wanted):
        client.sendto(str(number).encode(), sock.getsockname())
    listener = DatagramListener(reactor, sock, inbox)
    nursery.start_soon(reactor.run)
    await inbox.filled()
    assert inbox.messages == [str(number).encode() for number in range(inbox.wanted)]
    listener.close()


async def test_a_bug_with_one_datagram_does_not_end_the_others(
    nursery: trio.Nursery, client: socket.socket
):
    reactor, inbox = Reactor(), Inbox()
    inbox.wanted = 2
    sock = datagram.bind_datagram(OURS, Endpoint.parse("127.0.0.1:0"))
    client.sendto(b"bug", sock.getsockname())
    client.sendto(b"next", sock.getsockname())
    listener = DatagramListener(reactor, sock, inbox)
    nursery.start_soon(reactor.run)
    await inbox.filled()
    assert client.recv(10) == b"NEXT"
    listener.close()


def test_what_cannot_be_sent_is_lost() -> None:
    async def main() -> None:
        reactor = Reactor()
        sock = datagram.bind_datagram(OURS, Endpoint.parse("127.0.0.1:0"))
        listener = DatagramListener(reactor, sock, Inbox())
        listener.send(bytes(70000), ("127.0.0.1", 9))
        listener.close()
        listener.on_event(1)
        with trio.move_on_after(0):
            await reactor.run()

    trio.run(main)


@LOOPBACKS
def test_a_taken_port_is_named(host: str) -> None:
    with datagram.bind_datagram(OURS, Endpoint.parse(host)) as first:
        here = Endpoint.of(first.getsockname())
        with pytest.raises(ConfigError) as caught:
            datagram.bind_datagram(OURS, here)
    assert str(caught.value) == f"failed to bind to address {here}: Address already in use"


def test_a_port_can_be_shared_by_two_proxies() -> None:
    sharing = SocketFactory(netns=None, mark=None, keepalive=None, port_reuse=True)
    with datagram.bind_datagram(sharing, Endpoint.parse("127.0.0.1:0")) as first:
        here = Endpoint.of(first.getsockname())
        with datagram.bind_datagram(sharing, here) as second:
            assert Endpoint.of(second.getsockname()) == here


def test_a_connected_socket_hears_its_server_only(client: socket.socket) -> None:
    client.bind(("127.0.0.1", 0))
    with (
        datagram.bind_datagram(OURS, Endpoint.parse("127.0.0.1:0")) as server,
        datagram.connect_datagram(OURS, Endpoint.of(server.getsockname())) as sock,
    ):
        client.sendto(b"spoofed", sock.getsockname())
        with pytest.raises(BlockingIOError):
            sock.recv(10)
        server.sendto(b"real", sock.getsockname())
        assert sock.recv(10) == b"real"


@pytest.mark.parametrize("open_it", [datagram.connect_datagram, datagram.dial_resolver])
def test_an_impossible_server_is_an_error(open_it) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
        open_it(OURS, Endpoint.parse("[fe80::1]:53"))


class Namespace:
    """Calls a function "in a pod", and notes that it did."""

    def __init__(self) -> None:
        self.calls = 0

    def call(self, function):
        self.calls += 1
        return function()


def test_sockets_are_made_in_the_pod() -> None:
    pod = Namespace()
    with datagram.bind_datagram(replace(OURS, netns=pod), Endpoint.parse("127.0.0.1:0")) as sock:
        assert pod.calls == 1
        assert sock.gettimeout() == 0
        assert not sock.get_inheritable()
    assert datagram.loopback_has_ipv6(replace(OURS, netns=pod)) in {True, False}
    assert pod.calls == 2


def test_a_mark_that_cannot_be_set_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket, mark: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(datagram.sockopt, "set_mark", refuse)
    marked, before = replace(OURS, mark=1337), open_descriptors()
    with pytest.raises(PermissionError):
        datagram.connect_datagram(marked, Endpoint.parse("127.0.0.1:53"))
    with pytest.raises(ConfigError, match="not permitted"):
        datagram.bind_datagram(marked, Endpoint.parse("127.0.0.1:0"))
    assert open_descriptors() == before


async def test_a_socket_that_fails_to_receive_carries_on() -> None:
    class Failing:
        """A socket to which the kernel reports an error of the network first."""

        def __init__(self) -> None:
            self.script = [OSError("unreachable"), (b"ping", ("192.0.2.1", 1)), BlockingIOError()]
            self.sent: list[bytes] = []

        def fileno(self) -> int:
            return 9

        def getsockname(self) -> SocketAddress:
            return "127.0.0.1", 53

        def recvfrom(self, size: int):
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            return step

        def sendto(self, data: bytes, receiver: SocketAddress) -> None:
            self.sent.append(data)

    class NoReactor:
        def register(self, sock: object, handler: object) -> None:
            pass

    sock = Failing()
    DatagramListener(NoReactor(), sock, Inbox()).on_event(READABLE)
    assert sock.sent == [b"PING"]


async def test_a_resolver_is_dialled_by_tcp() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        datagram.dial_resolver(OURS, Endpoint.of(server.getsockname())) as sock,
    ):
        with trio.fail_after(5):
            await trio.lowlevel.wait_writable(sock)
        assert sock.getpeername() == server.getsockname()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("text", "expected"), [("0\n", True), ("1\n", False)])
def test_loopback_has_ipv6_unless_it_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, expected: bool
) -> None:
    switch = tmp_path / "disable_ipv6"
    switch.write_text(text)
    monkeypatch.setattr(datagram, "_IPV6_SWITCH", switch)
    assert datagram.loopback_has_ipv6(OURS) is expected


def test_loopback_is_assumed_to_have_ipv6_if_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagram, "_IPV6_SWITCH", tmp_path / "missing")
    assert datagram.loopback_has_ipv6(OURS)
