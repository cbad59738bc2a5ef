"""Applications on both sides of a proxy: small TCP servers, and clients that check what they get.

The servers are trio handlers for one connection, run by `serve`. They keep half-closed connections
open and treat a reset as an ordinary end, because many tests cause one.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn

import trio

CHUNK_BYTES = 65_536
# A request for `source`: how many bytes to send, unsigned and big-endian.
SOURCE_REQUEST = struct.Struct("!Q")

Handler = Callable[[trio.SocketStream], Awaitable[None]]
Connect = Callable[[], Awaitable[trio.abc.HalfCloseableStream]]


async def listen(host: str = "127.0.0.1", port: int = 0) -> tuple[trio.SocketListener, int]:
    """Open a listener; give it and its port."""
    [listener] = await trio.open_tcp_listeners(port, host=host)
    return listener, int(listener.socket.getsockname()[1])


async def serve(
    handler: Handler,
    listener: trio.SocketListener,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Run `handler` for every connection until cancelled; report the port, own the listener."""

    async def tolerant(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except* trio.BrokenResourceError:
            pass  # the test, or the proxy under test, reset the connection

    async with listener:
        task_status.started(int(listener.socket.getsockname()[1]))
        await trio.serve_listeners(tolerant, [listener])
    raise AssertionError("serve_listeners only ends by cancellation")


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes; finish when the other side has."""
    while data := await stream.receive_some(CHUNK_BYTES):
        await stream.send_all(data)
    await stream.send_eof()


async def sink(stream: trio.SocketStream) -> None:
    """Take everything, and only after the other side has finished answer with its SHA-256."""
    digest = hashlib.sha256()
    while data := await stream.receive_some(CHUNK_BYTES):
        digest.update(data)
    await stream.send_all(digest.digest())
    await stream.send_eof()


async def source(stream: trio.SocketStream) -> None:
    """Read a SOURCE_REQUEST and send as many bytes: those of `random_bytes(size, seed=size)`."""
    request = await read_exactly(stream, SOURCE_REQUEST.size)
    (size,) = SOURCE_REQUEST.unpack(request)
    await stream.send_all(random_bytes(size, seed=size))
    await stream.send_eof()


def random_bytes(size: int, *, seed: int) -> bytes:
    """Give bytes in which no fault can hide behind repetition; the same for the same seed."""
    return random.Random(seed).randbytes(size)


async def read_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """Read `size` bytes.

    Raises:
        AssertionError: the stream ended before.
    """
    content = bytearray()
    while len(content) < size:
        data = await stream.receive_some(size - len(content))
        assert data, f"the stream ended after {len(content)} of {size} bytes"
        content += data
    return bytes(content)


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """Read until the other side finishes."""
    content = bytearray()
    while data := await stream.receive_some(CHUNK_BYTES):
        content += data
    return bytes(content)


async def echo_and_check(
    connect: Connect, *, streams: int = 16, size: int = 262_144, seed: int = 0
) -> None:
    """Open parallel streams to `echo`, send different random bytes on each, check what comes back.

    Sends in pieces of random length while it receives, then half-closes.

    Raises:
        ExceptionGroup: of AssertionErrors and whatever the streams raised.
    """
    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(partial(_echo_once, connect, size=size, seed=seed + number))


async def upload_and_check(connect: Connect, *, size: int = 262_144, seed: int = 0) -> None:
    """Send random bytes to `sink`, finish, and only then expect its answer: half-close kept."""
    content = random_bytes(size, seed=seed)
    async with await connect() as stream:
        await stream.send_all(content)
        await stream.send_eof()
        assert await read_to_end(stream) == hashlib.sha256(content).digest()


async def download_and_check(connect: Connect, *, size: int = 262_144) -> None:
    """Ask `source` for bytes, and receive all of them and its end while our side stays open."""
    async with await connect() as stream:
        await stream.send_all(SOURCE_REQUEST.pack(size))
        received = await read_to_end(stream)
        _assert_same(received, random_bytes(size, seed=size))
        await stream.send_eof()


async def _echo_once(connect: Connect, *, size: int, seed: int) -> None:
    content = random_bytes(size, seed=seed)
    received = bytearray()
    async with await connect() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(_send_in_pieces, stream, content, random.Random(seed))
        received += await read_to_end(stream)
    _assert_same(bytes(received), content)


async def _send_in_pieces(
    stream: trio.abc.HalfCloseableStream, content: bytes, dice: random.Random
) -> None:
    rest = memoryview(content)
    while rest:
        piece = dice.randint(1, CHUNK_BYTES)
        await stream.send_all(rest[:piece])
        rest = rest[piece:]
    await stream.send_eof()


def _assert_same(received: bytes, wanted: bytes) -> None:
    """Compare without printing megabytes."""
    if received == wanted:
        return
    pairs = enumerate(zip(received, wanted, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(received), len(wanted)))
    raise AssertionError(
        f"{len(received)} of {len(wanted)} bytes; they differ from byte {first} on"
    )
