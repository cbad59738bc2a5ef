"""One HTTP/1.1 POST over a UNIX stream socket, and its answer (RFC 9112).

By hand, because `http.client` alone takes longer to import than the whole plugin may take to run.
The peer is always one of two servers we know, and each connection carries one request.
"""

from __future__ import annotations

import _socket as socket  # the module of that name loads much that is not needed here
import re
import sys
import time

OK = 200
_STATUS = re.compile(r"[1-9][0-9]{2}")
_HEAD_BYTES_MAX = 65536
_CHUNK_BYTES = 65536
_SIZE_LINE_BYTES_MAX = 1024
_HEAD_END = b"\r\n\r\n"
_RETRY_SECONDS = 0.05
_FD_BYTES = 4  # of a C int


class AnswerError(Exception):
    """What came back is not HTTP, or not all of it came back."""


class Deadline:
    """The time by which all of a call must be over."""

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """Give the time left.

        Raises:
            TimeoutError: there is none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def pause(self) -> bool:
        """Wait a moment before trying again; false if there is no time for it."""
        has_time = time.monotonic() + _RETRY_SECONDS < self._end
        if has_time:
            time.sleep(_RETRY_SECONDS)
        return has_time


def connect(path: str, deadline: Deadline, *, patiently: bool) -> socket.socket:
    """Connect to `path`; `patiently` means to try until the deadline if nobody listens yet.

    The caller closes the socket.

    Raises:
        OSError: nobody listens there.
    """
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(deadline.seconds_left())
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            if not (patiently and deadline.pause()):
                raise
        except BaseException:
            sock.close()
            raise
        else:
            return sock


def request(target: str, body: bytes) -> bytes:
    """Give the bytes of a POST of some JSON."""
    head = (
        f"POST {target} HTTP/1.1\r\nHost: unix\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def send(sock: socket.socket, data: bytes, deadline: Deadline, *, fds: list[int]) -> None:
    """Send a request, and descriptors along with its first bytes.

    Raises:
        OSError: the peer went away, or time is up.
    """
    sock.settimeout(deadline.seconds_left())
    rights = b"".join(fd.to_bytes(_FD_BYTES, sys.byteorder) for fd in fds)
    along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    sent = sock.sendmsg([data], along) if fds else 0
    while sent < len(data):
        sock.settimeout(deadline.seconds_left())
        sent += sock.send(data[sent:])


def receive(sock: socket.socket, deadline: Deadline, *, body_bytes_max: int) -> tuple[int, bytes]:
    """Receive the answer: its status, and for a failure as much of the body as is allowed.

    The body of a success says nothing, so nobody waits for it.

    Raises:
        AnswerError: the answer is not HTTP, or too long.
        OSError: the peer went away, or time is up.
    """
    data = b""
    while _HEAD_END not in data:
        piece = _receive_some(sock, deadline)
        if not piece:
            raise AnswerError("the connection ended before the answer did")
        data += piece
        if len(data) > _HEAD_BYTES_MAX:
            raise AnswerError("the answer's head is too long")
    head, _, body = data.partition(_HEAD_END)
    status, is_chunked = parse_head(head)
    if status == OK:
        return status, b""
    # The wire holds more bytes than the body where it is chunked; twice as many is plenty.
    while len(body) < 2 * body_bytes_max and (piece := _receive_some(sock, deadline)):
        body += piece
    return status, (unchunk(body) if is_chunked else body)[:body_bytes_max]


def parse_head(head: bytes) -> tuple[int, bool]:
    """Read the status and whether the body is chunked.

    Raises:
        AnswerError: this is not the head of an HTTP/1.x answer.
    """
    line, *fields = head.decode("latin-1").split("\r\n")
    protocol, _, rest = line.partition(" ")
    status = rest.partition(" ")[0]
    if not protocol.startswith("HTTP/1.") or _STATUS.fullmatch(status) is None:
        raise AnswerError(f"the answer is not HTTP: {line[:100]!r}")
    lowered = (field.lower().partition(":") for field in fields)
    codings = [value for name, _, value in lowered if name.strip() == "transfer-encoding"]
    return int(status), any("chunked" in coding for coding in codings)


def unchunk(body: bytes) -> bytes:
    """Join the chunks of a body (RFC 9112 s7.1), as far as they are complete and sound."""
    joined, at = b"", 0
    while True:
        end = body.find(b"\r\n", at, at + _SIZE_LINE_BYTES_MAX)
        try:
            size = int(body[at : max(end, at)].partition(b";")[0], 16)
        except ValueError:
            return joined
        if size <= 0:
            return joined
        joined += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


def _receive_some(sock: socket.socket, deadline: Deadline) -> bytes:
    sock.settimeout(deadline.seconds_left())
    return sock.recv(_CHUNK_BYTES)
