"""Messages and descriptors over a real socket pair, and how the end of the other side shows."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.errors import PeerError, UnreachableError
from ztunnel.transport.sockets import local_pair
from ztunnel.workers import link as module
from ztunnel.workers.frames import Frame, pack
from ztunnel.workers.link import Link


@asynccontextmanager
async def a_link() -> AsyncIterator[tuple[Link, socket.socket]]:
    ours, theirs = local_pair()
    link = Link(ours, "the worker")
    with theirs:
        try:
            yield link, theirs
        finally:
            link.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def ignore(frame: Frame) -> None:
    await trio.lowlevel.checkpoint()
    del frame


async def test_messages_and_their_descriptors_arrive_in_order() -> None:
    ours, theirs = local_pair()
    sender, receiver = Link(ours, "b"), Link(theirs, "a")
    wanted = [(b"first", None), (b"x" * 3_000_000, b"big"), (b"", None), (b"last", b"small")]
    found: list[tuple[bytes, bytes | None]] = []
    async with trio.open_nursery() as nursery:

        async def received(frame: Frame) -> None:
            content = None
            if frame.fd is not None:
                content = os.pread(frame.fd, 100, 0)
                os.close(frame.fd)
            found.append((frame.body, content))
            if len(found) == len(wanted):
                nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()

        nursery.start_soon(sender.run, ignore)
        nursery.start_soon(receiver.run, received)
        for body, content in wanted:
            if content is None:
                sender.post(body)
                continue
            fd = os.memfd_create("link")
            os.write(fd, content)
            sender.post(body, fd)
            os.close(fd)
        with trio.fail_after(5):
            await trio.sleep_forever()
    assert found == wanted


async def test_the_end_of_the_other_side_is_named() -> None:
    async with a_link() as (link, theirs):
        theirs.close()
        with pytest.raises(UnreachableError, match="the worker has closed the link"):
            await link.run(ignore)


async def test_nonsense_ends_the_link() -> None:
    async with a_link() as (link, theirs):
        theirs.send(b"\xff" * 10)
        with pytest.raises(PeerError, match="are the most"):
            await link.run(ignore)


async def test_whoever_reads_nothing_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "SEND_SECONDS", 0.05)
    async with a_link() as (link, _):
        link.post(b"x" * 10_000_000)
        with pytest.raises(UnreachableError, match="read nothing for"):
            await link.run(ignore)


async def test_a_queue_without_end_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES_MAX", 1000)
    async with a_link() as (link, _):
        link.post(b"x" * 1001)
        with pytest.raises(UnreachableError, match="has not read 1000 bytes"):
            await link.run(ignore)


async def test_a_sender_of_much_waits_for_room(monkeypatch) -> None:
    monkeypatch.setattr(module, "SHORT_QUEUE_BYTES", 100_000)
    async with a_link() as (link, theirs), trio.open_nursery() as nursery:

        async def run() -> None:
            with pytest.raises(UnreachableError):
                await link.run(ignore)

        await link.short()
        link.post(b"x" * 5_000_000)
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        waiting = trio.Event()

        async def wait() -> None:
            await link.short()
            waiting.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waiting.is_set()
        reader = trio.socket.from_stdlib_socket(theirs)
        left = 5_000_000
        with trio.fail_after(5):
            while left > 0:
                left -= len(await reader.recv(1_000_000))
            await waiting.wait()
        theirs.shutdown(socket.SHUT_RDWR)


async def test_what_was_not_sent_keeps_no_descriptor() -> None:
    async with a_link() as (link, _):
        before = open_descriptors()
        fd = os.memfd_create("link")
        link.post(b"never", fd)
        os.close(fd)
        link.close()
        assert open_descriptors() == before - 1  # the link's own
        link.post(b"ignored")


async def test_a_descriptor_of_a_message_that_was_not_handed_on_is_closed() -> None:
    async with a_link() as (link, theirs):
        fd = os.memfd_create("link")
        before = open_descriptors()
        both = pack(b"one") + pack(b"two", has_fd=True)
        socket.send_fds(theirs, [both], [fd])

        async def fails(frame: Frame) -> None:
            await trio.lowlevel.checkpoint()
            raise PeerError("no such message")

        with pytest.raises(PeerError, match="no such message"):
            await link.run(fails)
        assert open_descriptors() == before - 1  # the link's own
        os.close(fd)


@pytest.mark.parametrize("read", [0, 5, 5 + 3_000_000])
async def test_a_link_that_is_closed_while_it_sends_ends_and_keeps_no_descriptor(read: int) -> None:
    before = open_descriptors()
    async with a_link() as (link, theirs):
        with Path(os.devnull).open("rb") as file:
            for _ in range(3):
                link.post(b"x" * 3_000_000, file.fileno())
        theirs.settimeout(0)

        async def close() -> None:
            await trio.testing.wait_all_tasks_blocked()
            left = read
            while left > 0:
                try:
                    left -= len(theirs.recv(left))
                except BlockingIOError:
                    await trio.lowlevel.checkpoint()
            link.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(UnreachableError), trio.fail_after(5):
                await link.run(ignore)
    assert open_descriptors() == before
