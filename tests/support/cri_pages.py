"""Pages of the servers on a node's loopback interface, by calls that block."""

from __future__ import annotations

from tests.support.namespaces import connect
from ztunnel.linux.netns import PodNetns


def fetch(space: PodNetns, port: int, target: str) -> tuple[int, str]:
    """Get a page from a server on a node's loopback interface."""
    with connect(space, "127.0.0.1", port) as sock:
        request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sock.sendall(request.encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        body = _unchunked(body)
    return int(head.split(maxsplit=2)[1]), body.decode()


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + body[:length], body[length + 2 :]
    return whole


def answers(space: PodNetns, port: int, target: str) -> bool:
    """Whether a server says that all is well."""
    try:
        return fetch(space, port, target)[0] == 200
    except OSError:
        return False
