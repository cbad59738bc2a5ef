"""A small HTTP/1.1 server and client for tests: random bodies in both directions."""

from __future__ import annotations

import trio

from tests.support.peers import random_bytes, read_exactly

HEAD_BYTES_MAX = 16_384
END_OF_HEAD = b"\r\n\r\n"


async def serve_http(stream: trio.SocketStream) -> None:
    """Answer requests until the client finishes.

    A POST gets its body back. A GET of `/SIZE` gets `random_bytes(SIZE, seed=SIZE)`; one of
    `/until-close/SIZE` gets the same without its length: only the end of the connection ends it.
    """
    while head := await _read_head(stream):
        request, *_ = head.split(b"\r\n", 1)
        method, path, _ = request.split(b" ")
        if method == b"GET":
            size = int(path.rpartition(b"/")[2])
            body = random_bytes(size, seed=size)
        else:
            body = await read_exactly(stream, content_length(head))
        if path.startswith(b"/until-close/"):
            await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
            break
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        await stream.send_all(body)
    await stream.send_eof()


async def post(stream: trio.SocketStream, body: bytes) -> tuple[bytes, bytes]:
    """Send one request and give head and body of the answer, which must say its length."""
    head = b"POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, head + body)
        answer = await _read_head(stream)
        content = await read_exactly(stream, content_length(answer))
    return answer, content


def content_length(head: bytes) -> int:
    """Give the length that a message head announces.

    Raises:
        ValueError: it does not say.
    """
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    raise ValueError(f"no content-length: {head!r}")


async def _read_head(stream: trio.abc.ReceiveStream) -> bytes:
    """Read up to the empty line, byte by byte so that the body stays; empty at the end."""
    head = bytearray()
    while not head.endswith(END_OF_HEAD):
        byte = await stream.receive_some(1)
        if not byte:
            assert not head, f"the stream ended inside a head: {bytes(head)!r}"
            return b""
        head += byte
        assert len(head) <= HEAD_BYTES_MAX
    return bytes(head)
