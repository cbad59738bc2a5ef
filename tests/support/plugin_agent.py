"""A node agent as far as the CNI plugin can see: a socket, and an answer."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_SECONDS = 10.0


class StandInAgent:
    """Answers each request with `answer`, and remembers what it was asked.

    `folder` is the agent's run directory; without one it makes a short path of its own, because
    socket paths have 107 bytes at most.
    """

    def __init__(
        self, folder: Path | None = None, *, socket_name: str = "pluginevent.sock"
    ) -> None:
        self._own_folder = None if folder else tempfile.TemporaryDirectory(prefix="agent")
        self.run_dir = folder or Path(self._own_folder.name if self._own_folder else "")
        self.path = self.run_dir / socket_name
        self.answer = http_answer(200, "")
        self.requests: list[bytes] = []
        self.descriptors: list[os.stat_result] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_SECONDS)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self._own_folder:
            self._own_folder.cleanup()

    def refuse(self, status: int, reason: str) -> None:
        """Answer like this from now on."""
        self.answer = http_answer(status, reason)

    @property
    def bodies(self) -> list[dict[str, object]]:
        """What was posted."""
        return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in self.requests]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(_SECONDS)
                self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        request = b""
        while not is_complete(request):
            data, fds, _, _ = socket.recv_fds(connection, 65536, 4)
            for fd in fds:
                self.descriptors.append(os.fstat(fd))
                os.close(fd)
            if not data:
                return
            request += data
        self.requests.append(request)
        connection.sendall(self.answer)

    def got_a_namespace(self) -> bool:
        """Whether a descriptor on something that is a file came with a request."""
        return any(stat.S_ISREG(status.st_mode) for status in self.descriptors)


def is_complete(request: bytes) -> bool:
    """Whether all of a request is there."""
    head, end, body = request.partition(b"\r\n\r\n")
    lengths = [
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    ]
    return bool(end) and len(body) >= sum(lengths)


def http_answer(status: int, text: str) -> bytes:
    """Give an answer as Go's server writes it."""
    body = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
