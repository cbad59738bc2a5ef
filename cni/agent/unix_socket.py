"""The node agent's UNIX sockets: for proxies, plugin and operators (cni.md 6.1, 1.4).

A file that an agent left behind when it was killed is replaced; that of an agent which still
answers is not. At the end the file goes, unless somebody else has put theirs in its place.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import trio

from cni.agent.errors import SocketPathError

PATH_BYTES_MAX = 107  # sockaddr_un has 108 with the terminator
BACKLOG = 128

FileIdentity = tuple[int, int, int]  # device, inode, time of making


def identity_of(path: Path) -> FileIdentity | None:
    """Say which file is at a path; None if there is none.

    The time it was made belongs to it: the number of a removed file is given to the next one.
    """
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


class UnixListener:
    """A listening socket and its file; closing it is a matter of `with`."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.path = path
        self.identity = identity_of(path)

    def is_in_place(self) -> bool:
        """Whether the file at our path is ours still."""
        return identity_of(self.path) == self.identity

    def close(self) -> None:
        """Stop listening and remove the file, if it is ours."""
        self.sock.close()
        if self.is_in_place():
            with suppress(OSError):  # The next agent removes it.
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> trio.socket.SocketType:
        return self.sock

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def listen_unix(
    path: Path, *, kind: int = socket.SOCK_STREAM, mode: int | None = None
) -> UnixListener:
    """Listen at `path`; `mode`: who may connect, by default whom the umask lets.

    Raises:
        SocketPathError: the path is too long, in use, or is no socket.
    """
    if len(bytes(path)) > PATH_BYTES_MAX:
        raise SocketPathError(f"socket path longer than {PATH_BYTES_MAX} bytes: {path}")
    _clear(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        # The reference's modes: proxies need not be in our group, the runtime's plugins are root.
        folder_mode = 0o777 if mode is None else 0o750
        path.parent.mkdir(mode=folder_mode, parents=True, exist_ok=True)
        sock.bind(os.fspath(path))
        if mode is not None:
            path.chmod(mode)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise SocketPathError(f"cannot listen at {path}: {exc}") from exc
    return UnixListener(sock, path)


def _clear(path: Path, kind: int) -> None:
    """Remove a socket file that nobody listens at."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise SocketPathError(f"cannot listen at {path}: {exc}") from exc
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"cannot listen at {path}: it exists and is no socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        # A full backlog is an answer, too: somebody is there.
        probe.settimeout(0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as exc:
            raise SocketPathError(f"cannot listen at {path}: in use ({exc})") from exc
    raise SocketPathError(f"cannot listen at {path}: another node agent does")
