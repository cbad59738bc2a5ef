"""What the plugin says for operators to find (cni.md 1.6).

Three places: stderr, which ends in the runtime's journal; the file `istio-cni.log` in the agent's
run directory; and, at the end, the agent itself, which shows the lines among its own. stdout
belongs to the result. Nothing here may fail a command: what cannot be said is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import time

from cni.plugin.netconf import DEFAULT_RUN_DIR, LOG_LEVELS
from cni.plugin.unix_http import AnswerError, Deadline, connect, receive, request, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FILE_NAME = "istio-cni.log"
BACKUP_NAME = "istio-cni.log.1"
FILE_BYTES_MAX = 10 * 1024 * 1024  # as the reference; with the backup, twice that
SOCKET_NAME = "log.sock"
_SOCKET_SECONDS = 1.0
_ANSWER_BYTES_MAX = 4096
_FILE_MODE = 0o640


class Journal:
    """The lines of one command. `write` takes each for stderr; `now` is seconds since the epoch."""

    __slots__ = ("_level", "_lines", "_now", "_pairs", "_run_dir", "_write")

    def __init__(
        self, write: Callable[[bytes], object], *, now: Callable[[], float] = time.time
    ) -> None:
        self._write = write
        self._now = now
        self._lines: list[str] = []
        self._pairs: dict[str, str] = {}
        self._run_dir = DEFAULT_RUN_DIR
        self._level = LOG_LEVELS.index("info")

    def configure(self, *, run_dir: str, level: str) -> None:
        """Say where the agent lives and from which level on lines count."""
        self._run_dir = run_dir
        self._level = LOG_LEVELS.index(level)

    def bind(self, **pairs: str) -> None:
        """Add labels to all lines that follow."""
        self._pairs.update(pairs)

    def debug(self, message: str, **pairs: str) -> None:
        """Say what only somebody looking for a fault wants to know."""
        self._say("debug", message, pairs)

    def info(self, message: str, **pairs: str) -> None:
        """Say what happened."""
        self._say("info", message, pairs)

    def error(self, message: str, **pairs: str) -> None:
        """Say why a command fails."""
        self._say("error", message, pairs)

    def close(self) -> None:
        """Hand the lines to the agent, if it wants them."""
        path = f"{self._run_dir}/{SOCKET_NAME}"
        if not self._lines or not os.path.exists(path):  # noqa: PTH110, pathlib takes 4 ms
            return
        deadline = Deadline(_SOCKET_SECONDS)
        try:
            sock = connect(path, deadline, patiently=False)
            try:
                body = json.dumps(self._lines).encode()
                send(sock, request("/log", body), deadline, fds=[])
                receive(sock, deadline, body_bytes_max=_ANSWER_BYTES_MAX)
            finally:
                sock.close()
        except (OSError, AnswerError):
            return  # The lines are on stderr and in the file.

    def _say(self, level: str, message: str, pairs: dict[str, str]) -> None:
        rank = LOG_LEVELS.index(level)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now()))
        line = json.dumps({"level": level, "time": when, "msg": message, **self._pairs, **pairs})
        if rank >= self._level:
            self._lines.append(line)
            self._write(line.encode() + b"\n")
        if rank >= LOG_LEVELS.index("info"):
            append_line(self._run_dir, line.encode() + b"\n")


def append_line(folder: str, line: bytes, *, bytes_max: int = FILE_BYTES_MAX) -> None:
    """Add a line to the log file, which becomes the backup when it is full.

    Several plugins do this at once: one write is one line, and the exchange happens under a lock.
    After a reboot the folder does not exist until the agent has made it; then there is no file.
    """
    path = f"{folder}/{FILE_NAME}"
    try:
        fd = _open(path)
        try:
            if os.fstat(fd).st_size + len(line) > bytes_max:
                _set_aside(fd, path, f"{folder}/{BACKUP_NAME}")
                os.close(fd)
                fd = _open(path)
            os.write(fd, line)
        finally:
            os.close(fd)
    except OSError:
        return


def _open(path: str) -> int:
    # Not through a symbolic link: the plugin is root and the folder is shared with a container.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(path, flags, _FILE_MODE)


def _set_aside(fd: int, path: str, backup: str) -> None:
    """Rename the full file, unless another plugin has done so since we opened it."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    ours, current = os.fstat(fd), os.stat(path)  # noqa: PTH116, pathlib takes 4 ms
    if (ours.st_dev, ours.st_ino) == (current.st_dev, current.st_ino):
        os.replace(path, backup)  # noqa: PTH105, pathlib takes 4 ms
