"""What operators ask a node proxy for, from inside its node's namespace."""

from __future__ import annotations

import json
import socket
from typing import Any

import trio

from tests.support.peers import read_to_end
from ztunnel.devmesh.cluster import Node

ADMIN, STATS, READINESS = 15000, 15020, 15021


async def connect(node: Node, port: int, host: str = "127.0.0.1") -> trio.SocketStream:
    sock = trio.socket.from_stdlib_socket(node.netns.call(socket.socket))
    await sock.connect((host, port))
    return trio.SocketStream(sock)


async def http(node: Node, port: int, request: str) -> tuple[str, bytes]:
    """Send `GET /path`; give the status line and the body as it comes."""
    async with await connect(node, port) as stream:
        await stream.send_all(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with trio.fail_after(10):
            head, _, body = (await read_to_end(stream)).partition(b"\r\n\r\n")
    return head.decode().splitlines()[0], body


async def page(node: Node, port: int, path: str) -> str:
    """Give the text of a page; fail unless it is there."""
    async with await connect(node, port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        with trio.fail_after(10):
            head, _, body = (await read_to_end(stream)).partition(b"\r\n\r\n")
    assert b" 200 " in head.partition(b"\r\n")[0], head
    return body.decode()


async def dump(node: Node, *types: str) -> Any:
    """Give the configuration dump, or the named parts of it."""
    return json.loads(await page(node, ADMIN, f"/config_dump?types={','.join(types)}"))


async def metrics(node: Node) -> dict[str, float]:
    """Scrape: value by name and labels as they are printed."""
    lines = (await page(node, STATS, "/metrics")).splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {key: float(value) for key, _, value in samples}


def total(samples: dict[str, float], name: str, *parts: str) -> float:
    """Add up the samples of a metric whose labels hold all of `parts`."""
    return sum(
        value
        for key, value in samples.items()
        if key.partition("{")[0] == name and all(part in key for part in parts)
    )
