from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.namespaces import needs_root
from ztunnel.linux import sockopt
from ztunnel.linux.sockopt import KeepaliveSettings
from ztunnel.model.network import Endpoint, parse_ip

BOTH = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


@pytest.mark.parametrize(
    ("listen_at", "connect_to"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")],
    ids=["ipv4", "ipv6", "ipv4 on a dual-stack listener"],
)
def test_without_redirection_the_destination_is_the_local_address(
    listen_at: str, connect_to: str
) -> None:
    family = socket.AF_INET6 if ":" in listen_at else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((listen_at, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((connect_to, port), timeout=5):
            accepted, _ = listener.accept()
            with accepted:
                expected = Endpoint(parse_ip(connect_to), port)
                assert sockopt.original_destination(accepted) == expected


def test_keepalive_is_set_as_asked(sock: socket.socket) -> None:
    sockopt.set_keepalive(sock, KeepaliveSettings(idle_seconds=7, interval_seconds=8, retries=3))
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [7, 8, 3]


def test_user_timeout_is_as_long_as_keepalive_waits(sock: socket.socket) -> None:
    sockopt.set_user_timeout(sock, KeepaliveSettings().user_timeout_seconds)
    timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert timeout == (180 + 9 * 180) * 1000


def test_reset_on_close_aborts_the_connection() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname(), timeout=5) as client:
            accepted, _ = listener.accept()
            sockopt.reset_on_close(accepted)
            accepted.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


@BOTH
def test_freebind_takes_an_address_that_is_not_ours(family: socket.AddressFamily) -> None:
    address = {socket.AF_INET: "203.0.113.9", socket.AF_INET6: "2001:db8::9"}[family]
    version = {socket.AF_INET: 4, socket.AF_INET6: 6}[family]
    with socket.socket(family) as sock:
        with pytest.raises(OSError, match="assign"):
            sock.bind((address, 0))
        sockopt.set_freebind(sock, version)
        sock.bind((address, 0))
        assert sock.getsockname()[0] == address


def test_a_bound_address_takes_no_port_before_it_connects(sock: socket.socket) -> None:
    sockopt.bind_address_no_port(sock)
    sock.bind(("127.0.0.1", 0))
    assert sock.getsockname() == ("127.0.0.1", 0)


@pytest.mark.netns
@needs_root
def test_the_mark_is_set(sock: socket.socket) -> None:
    sockopt.set_mark(sock, 1337)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 1337


@pytest.mark.netns
@needs_root
@BOTH
def test_transparent_is_set_for_the_family_of_the_socket(family: socket.AddressFamily) -> None:
    level, name, version = {socket.AF_INET: (0, 19, 4), socket.AF_INET6: (41, 75, 6)}[family]
    with socket.socket(family) as sock:
        assert sock.getsockopt(level, name) == 0
        sockopt.set_transparent(sock, version)
        assert sock.getsockopt(level, name) == 1


@pytest.mark.netns
@needs_root
def test_a_dual_stack_listener_gets_the_ipv4_option() -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sockopt.set_listener_transparent(sock)
        assert sock.getsockopt(socket.SOL_IP, 19) == 1


@pytest.mark.netns
@needs_root
def test_another_address_can_be_spoken_with(sock: socket.socket) -> None:
    sockopt.bind_as(sock, parse_ip("203.0.113.9"))
    assert sock.getsockname() == ("203.0.113.9", 0)


def test_linger_is_a_pair_of_ints() -> None:
    with socket.socket() as sock:
        sockopt.reset_on_close(sock)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", raw) == (1, 0)
