"""Sending and receiving on a non-blocking socket before the reactor owns it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ztunnel.transport.sockets import Socket


async def receive(sock: Socket, size: int) -> bytes:
    """Wait for up to `size` bytes; empty at the end of the stream.

    Raises:
        OSError: the connection broke.
    """
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def send(sock: Socket, data: bytes) -> None:
    """Send all of `data`.

    Raises:
        OSError: the connection broke.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
