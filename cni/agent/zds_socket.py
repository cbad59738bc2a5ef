"""The UNIX socket at which node proxies find the node agent (cni.md 6.1)."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import trio

from cni.agent.errors import SocketPathError

PATH_BYTES_MAX = 107  # sockaddr_un has 108 with the terminator
BACKLOG = 16


def listening_socket(path: str) -> trio.socket.SocketType:
    """Listen at `path`, in place of what an agent that was killed left there.

    Raises:
        SocketPathError: the path is too long, in use, or is no socket.
    """
    if len(path.encode()) > PATH_BYTES_MAX:
        raise SocketPathError(f"socket path longer than {PATH_BYTES_MAX} bytes: {path}")
    _clear(Path(path))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise SocketPathError(f"cannot listen at {path}: {exc}") from exc
    return trio.socket.from_stdlib_socket(sock)


def unlisten(sock: trio.socket.SocketType, path: str) -> None:
    """Stop listening and remove the file.

    Raises:
        OSError: the file cannot be removed.
    """
    sock.close()
    Path(path).unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens at."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise SocketPathError(f"cannot listen at {path}: {exc}") from exc
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"cannot listen at {path}: it exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        # A full backlog is an answer, too: somebody is there.
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as exc:
            raise SocketPathError(f"cannot listen at {path}: in use ({exc})") from exc
    raise SocketPathError(f"cannot listen at {path}: another node agent does")
