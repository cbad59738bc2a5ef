from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from tests.support.tunnels import a_permit, open_descriptors
from ztunnel.errors import ConfigError
from ztunnel.linux.sockopt import KeepaliveSettings
from ztunnel.model.network import Endpoint, parse_ip
from ztunnel.transport import sockets as module
from ztunnel.transport.sockets import SocketFactory

PLAIN = SocketFactory(netns=None, mark=None, keepalive=None)


class Namespace:
    """Calls a function "in a pod", and notes that it did."""

    def __init__(self) -> None:
        self.calls = 0

    def call(self, function):
        self.calls += 1
        return function()


@pytest.fixture
def server():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield sock


def test_a_socket_is_made_in_the_pod_and_does_not_block() -> None:
    pod = Namespace()
    with replace(PLAIN, netns=pod).create(socket.AF_INET) as sock:
        assert pod.calls == 1
        assert sock.gettimeout() == 0
        assert not sock.get_inheritable()


def test_a_mark_that_cannot_be_set_leaves_no_socket(monkeypatch) -> None:
    def refuse(sock: socket.socket, mark: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.sockopt, "set_mark", refuse)
    before = open_descriptors()
    with pytest.raises(PermissionError):
        replace(PLAIN, mark=1337).create(socket.AF_INET)
    assert open_descriptors() == before


def test_a_listener_takes_connections_of_both_families() -> None:
    with PLAIN.listen(0, transparent=False) as door:
        port = door.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port)).close()


def test_a_listener_without_ipv6_takes_ipv4_only() -> None:
    with replace(PLAIN, ipv6=False).listen(0, transparent=False) as door:
        assert door.family == socket.AF_INET


def test_a_port_that_is_taken_is_named(server) -> None:
    port = server.getsockname()[1]
    before = open_descriptors()
    with pytest.raises(ConfigError, match=rf"failed to bind to address 127.0.0.1:{port}: Address"):
        PLAIN.listen(port, transparent=False, host="127.0.0.1")
    assert open_descriptors() == before


def test_with_port_reuse_a_successor_may_listen_on_the_same_port() -> None:
    with PLAIN.listen(0, transparent=False, host="127.0.0.1") as door:
        port = door.getsockname()[1]
        PLAIN.listen(port, transparent=False, host="127.0.0.1").close()
        with pytest.raises(ConfigError):
            replace(PLAIN, port_reuse=False).listen(port, transparent=False, host="127.0.0.1")


def refuse_transparency(sock: socket.socket) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_transparency_is_tried_unless_the_operator_insists(monkeypatch) -> None:
    monkeypatch.setattr(module.sockopt, "set_listener_transparent", refuse_transparency)
    PLAIN.listen(0, transparent=None, host="127.0.0.1").close()
    before = open_descriptors()
    with pytest.raises(ConfigError, match="ENABLE_ORIG_SRC=true needs CAP_NET_ADMIN"):
        PLAIN.listen(0, transparent=True, host="127.0.0.1")
    assert open_descriptors() == before


def test_a_dial_begins_at_once_and_sets_what_every_connection_has(server) -> None:
    factory = replace(PLAIN, keepalive=KeepaliveSettings(idle_seconds=7), user_timeout=True)
    with factory.dial(a_permit(), Endpoint.of(server.getsockname())) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
        assert server.accept()[0].close() is None


def test_what_a_listener_accepts_has_what_every_connection_has() -> None:
    keepalive = KeepaliveSettings(idle_seconds=7, interval_seconds=8, retries=3)
    sockets = replace(PLAIN, keepalive=keepalive, user_timeout=True, ipv6=False)
    with (
        sockets.listen(0, transparent=False, host="127.0.0.1") as door,
        socket.create_connection(door.getsockname()),
    ):
        door.settimeout(5)
        with door.accept()[0] as accepted:
            for level, option, value in (
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 8),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 31_000),
            ):
                assert accepted.getsockopt(level, option) == value


def test_nothing_is_dialled_without_a_permit(server) -> None:
    with pytest.raises(AssertionError):
        PLAIN.dial(None, Endpoint.of(server.getsockname()))  # type: ignore[arg-type]


def test_a_dial_that_the_kernel_refuses_at_once_leaves_no_socket() -> None:
    before = open_descriptors()
    # A broadcast address takes no connections.
    with pytest.raises(OSError, match=r"unreachable|denied"):
        PLAIN.dial(a_permit(), Endpoint.parse("255.255.255.255:9"))
    assert open_descriptors() == before


@pytest.mark.parametrize("source", ["127.0.0.77", "2001:db8::1"])
def test_a_source_that_cannot_be_kept_does_not_prevent_the_connection(
    source: str, server, monkeypatch
) -> None:
    def refuse(sock: socket.socket, ip: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.sockopt, "bind_as", refuse)
    target = Endpoint.of(server.getsockname())
    with PLAIN.dial(a_permit(), target, source=parse_ip(source)):
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == "127.0.0.1"


def test_a_source_is_spoken_as(server, monkeypatch) -> None:
    monkeypatch.setattr(module.sockopt, "bind_as", lambda sock, ip: sock.bind((str(ip), 0)))
    target = Endpoint.of(server.getsockname())
    with PLAIN.dial(a_permit(), target, source=parse_ip("127.0.0.77")):
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == "127.0.0.77"
