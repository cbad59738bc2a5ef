from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.namespaces import open_descriptors
from ztunnel.errors import PeerError
from ztunnel.linux import fdpass
from ztunnel.linux.fdpass import Message

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        yield near, far


def rights(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def test_each_packet_is_one_message(pair: Pair) -> None:
    near, far = pair
    fdpass.send_message(near, b"one")
    fdpass.send_message(near, b"two")
    assert fdpass.receive_message(far) == Message(b"one")
    assert fdpass.receive_message(far) == Message(b"two")


def test_a_descriptor_arrives_and_is_not_inherited(pair: Pair) -> None:
    near, far = pair
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        fdpass.send_message(near, b"take this", fd)
        message = fdpass.receive_message(far)
        assert message is not None
        assert message.fd is not None
        assert os.path.samestat(os.fstat(message.fd), os.fstat(fd))
        assert message.fd != fd
        assert not os.get_inheritable(message.fd)
        os.close(message.fd)
    finally:
        os.close(fd)


def test_the_end_of_the_stream_is_no_message(pair: Pair) -> None:
    near, far = pair
    near.close()
    assert fdpass.receive_message(far) is None


@pytest.mark.parametrize("size", [0, 1025])
def test_a_message_that_cannot_be_read_is_not_sent(pair: Pair, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 1024 bytes"):
        fdpass.send_message(pair[0], bytes(size))


def test_the_longest_message_arrives(pair: Pair) -> None:
    near, far = pair
    fdpass.send_message(near, b"x" * 1024)
    assert fdpass.receive_message(far) == Message(b"x" * 1024)


@pytest.mark.parametrize(
    ("data", "count", "problem"),
    [
        pytest.param(b"x" * 1025, 0, "longer than 1024", id="a long message"),
        pytest.param(b"x" * 1025, 1, "longer than 1024", id="a long message with a descriptor"),
        pytest.param(b"x", 2, "2 descriptors", id="two descriptors"),
        pytest.param(b"x", 20, "more than", id="twenty descriptors"),
        pytest.param(b"", 1, "without a message", id="only a descriptor"),
    ],
)
def test_what_breaks_the_rules_is_refused_and_closed(
    pair: Pair, data: bytes, count: int, problem: str
) -> None:
    near, far = pair
    before = open_descriptors()
    near.sendmsg([data], rights(*[near.fileno()] * count) if count else [])
    with pytest.raises(PeerError, match=problem):
        fdpass.receive_message(far)
    assert open_descriptors() == before


def test_other_control_messages_are_ignored() -> None:
    credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12))
    assert fdpass.unpack(b"x", [credentials], 0) == Message(b"x")
