from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from ztunnel.transport.outbox import UNREAD_MOST, Outbox

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    near, far = socket.socketpair()
    near.settimeout(0)
    with near, far:
        yield near, far


def receive(sock: socket.socket, size: int) -> bytes:
    return sock.recv(size, socket.MSG_WAITALL)


def test_what_fits_leaves_at_once_in_order(ends: Ends) -> None:
    near, far = ends
    outbox = Outbox(near)
    outbox.send(b"one", memoryview(b"two"))
    assert not outbox.blocked
    assert receive(far, 6) == b"onetwo"


@given(sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=5))
def test_nothing_is_lost_or_swapped_when_the_socket_is_full(sizes: list[int]) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(0)
        outbox = Outbox(near)
        wanted = b"".join(bytes([65 + number]) * size for number, size in enumerate(sizes))
        received = b""
        for number, size in enumerate(sizes):
            outbox.send(b"", bytes([65 + number]) * size)
            while outbox.blocked:
                received += far.recv(1 << 20)
                outbox.drain()
        while len(received) < len(wanted):
            received += far.recv(1 << 20)
        assert received == wanted


def test_a_peer_that_does_not_read_is_noticed_by_what_waits_behind(ends: Ends) -> None:
    near, _ = ends
    outbox = Outbox(near)
    assert not outbox.is_unread(UNREAD_MOST + 1)
    outbox.send(b"", bytes(2_000_000))
    assert not outbox.is_unread(UNREAD_MOST)
    assert outbox.is_unread(UNREAD_MOST + 1)


def test_the_callers_buffer_may_be_reused_at_once(ends: Ends) -> None:
    near, far = ends
    buffer = bytearray(b"x" * 2_000_000)
    outbox = Outbox(near)
    outbox.send(b"", memoryview(buffer))
    assert outbox.blocked
    buffer[:] = b"y" * len(buffer)
    received = b""
    while len(received) < len(buffer):
        received += far.recv(1 << 20)
        outbox.drain()
    assert received == b"x" * len(buffer)


def test_a_broken_connection_is_an_error_and_stays_blocked(ends: Ends) -> None:
    near, far = ends
    far.close()
    outbox = Outbox(near)
    with pytest.raises(BrokenPipeError):
        outbox.send(b"", b"x")
    assert outbox.blocked
    assert not outbox.drain()
