"""Network namespaces: name them, hold them, and act inside them (cni.md 3.9, performance.md 10).

How it works: a socket stays in the namespace it was created in, so we enter a pod only for the
few microseconds that creating one takes, and use the socket from anywhere afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self, TypeVar

from ztunnel.linux.closing import Closing

T = TypeVar("T")

CLONE_NEWNET = 0x4000_0000  # linux/sched.h
_MS_BIND = 0x1000  # linux/mount.h
_MNT_DETACH = 0x2

# os.setns and os.unshare exist from Python 3.12 on; we support 3.11.
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, order=True)
class NetnsId:
    """What tells two namespaces apart while both exist; inodes are used again afterwards."""

    inode: int
    device: int


def _setns_by_libc(fd: int, kind: int) -> None:
    if _libc.setns(fd, kind) != 0:
        raise _error("setns")


# Python's own, where there is one, takes two thirds of the time; a new connection makes two calls.
_setns: Callable[[int, int], None] = getattr(os, "setns", _setns_by_libc)


def identify(fd: int) -> NetnsId:
    """Read the identity of the namespace that `fd` is open on."""
    status = os.fstat(fd)
    return NetnsId(status.st_ino, status.st_dev)


def current() -> NetnsId:
    """Read the identity of the namespace the calling thread is in."""
    status = Path("/proc/thread-self/ns/net").stat()
    return NetnsId(status.st_ino, status.st_dev)


def enter(fd: int) -> None:
    """Move the calling thread into a namespace for good.

    Only for a thread or process that never does anything else; see `PodNetns.call`.

    Raises:
        OSError: `fd` is not a network namespace, or CAP_SYS_ADMIN is missing.
    """
    _setns(fd, CLONE_NEWNET)


def leave_for_new() -> None:
    """Move the calling thread into a new, empty namespace for good.

    Raises:
        OSError: CAP_SYS_ADMIN is missing.
    """
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise _error("unshare")


def pin(fd: int, path: Path) -> None:
    """Give a namespace a name in the file system, where it lives on without us.

    Raises:
        OSError: `path` exists, or a privilege is missing.
    """
    path.touch(exist_ok=False)
    source = f"/proc/self/fd/{fd}".encode()
    if _libc.mount(source, bytes(path), b"none", _MS_BIND, None) != 0:
        error = _error(f"mount {path}")
        path.unlink()
        raise error


def unpin(path: Path) -> None:
    """Take the name away again; no error if it is no mount any more or gone.

    Raises:
        OSError: a privilege is missing.
    """
    if _libc.umount2(bytes(path), _MNT_DETACH) != 0:
        error = _error(f"umount {path}")
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise error
    path.unlink(missing_ok=True)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


@lru_cache(maxsize=1)
def _home() -> int:
    """Open the namespace of the process's first thread; kept open as long as the process lives."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class PodNetns(Closing):
    """An open descriptor on a pod's namespace, and the way back to our own.

    Holding one keeps the namespace of a dead pod alive, so whoever owns it closes it.
    """

    __slots__ = ("_fd", "id")

    def __init__(self, fd: int) -> None:
        """Take over `fd`, which `close` will close."""
        _home()  # Found out now: by the time of a call we might be in another namespace.
        self.id = identify(fd)
        self._fd = fd

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a namespace by its file, such as `/proc/1/ns/net`.

        Raises:
            OSError: the file cannot be opened.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def duplicate(self) -> PodNetns:
        """Make a second, independent holder of the same namespace."""
        return PodNetns(os.dup(self.fileno()))

    def fileno(self) -> int:
        """Return the descriptor, which stays ours.

        Raises:
            ValueError: it has been closed.
        """
        if self._fd < 0:
            raise ValueError("the namespace has been closed")
        return self._fd

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` inside the pod and come home to the process's own namespace.

        `action` is usually one `socket()` and its options. It is a plain function because an
        `await` here would run other pods' tasks in this pod's namespace; and it starts no thread
        or process, which would inherit the namespace. Calls do not nest.

        Raises:
            OSError: the namespace cannot be entered.
        """
        enter(self.fileno())
        try:
            return action()
        finally:
            try:
                enter(_home())
            except OSError:
                os.abort()  # Carrying on would send one pod's traffic out of another pod.

    def close(self) -> None:
        """Let go of the namespace; more than once is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"PodNetns(inode={self.id.inode}, fd={self._fd})"
