from __future__ import annotations

import os
import socket

import pytest

from ztunnel.transport.splice import SplicePipe


@pytest.fixture
def pipe() -> object:
    made = SplicePipe.make()
    assert made is not None
    yield made
    made.close()


def pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.settimeout(0)
    return near, far


def fill_up(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(b"y" * 65536)
    except BlockingIOError:
        return


def test_what_goes_in_comes_out(pipe: SplicePipe) -> None:
    source, writer = pair()
    target, reader = pair()
    with source, writer, target, reader:
        writer.sendall(b"x" * 50_000)
        assert pipe.fill(source.fileno()) == pipe.held == 50_000
        assert pipe.drain(target.fileno()) == 50_000
        assert pipe.held == 0
        assert reader.recv(100_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"x" * 50_000


def test_a_source_with_nothing_would_block_and_a_finished_one_gives_nothing(pipe) -> None:
    source, writer = pair()
    with source, writer:
        with pytest.raises(BlockingIOError):
            pipe.fill(source.fileno())
        writer.shutdown(socket.SHUT_WR)
        assert pipe.fill(source.fileno()) == 0


def test_a_full_target_would_block_and_loses_nothing(pipe: SplicePipe) -> None:
    source, writer = pair()
    target, reader = pair()
    with source, writer, target, reader:
        fill_up(target)
        writer.sendall(b"x" * 1000)
        pipe.fill(source.fileno())
        with pytest.raises(BlockingIOError):
            pipe.drain(target.fileno())
        assert pipe.held == 1000


def test_without_descriptors_there_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe2", none_left)
    assert SplicePipe.make() is None
