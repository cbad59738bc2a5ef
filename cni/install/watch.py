"""Folders watched for changes by inotify(7); where that cannot be had, looked at now and then."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

import trio

from ztunnel.linux.closing import Closing

# linux/inotify.h: modified, permissions, written and closed, moved from, moved to, created,
# deleted, itself deleted, itself moved
_CHANGES = 0x02 | 0x04 | 0x08 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
_READ_BYTES = 65536
LOOK_SECONDS = 30.0  # file systems of other machines tell us nothing
POLL_SECONDS = 1.0  # without inotify

_libc = ctypes.CDLL(None, use_errno=True)


class Watch(Closing):
    """A set of watched folders. Close it, or use it as a context manager."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        # A node has few of them, and others may have taken them all: then we poll.
        self._fd: int | None = fd if fd >= 0 else None

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def cover(self, folders: Iterable[Path]) -> bool:
        """Watch these folders from now on; return whether all of them are.

        Those that are watched already stay so. Those that do not exist yet need another call.
        """
        if self._fd is None:
            return False
        fd = self._fd
        added = [_libc.inotify_add_watch(fd, os.fsencode(path), _CHANGES) for path in folders]
        return min(added, default=0) >= 0

    async def changed(self, *, at_most_seconds: float = LOOK_SECONDS) -> bool:
        """Wait until something changes; false if only time has passed."""
        if self._fd is None:
            await trio.sleep(min(POLL_SECONDS, at_most_seconds))
            return False
        with trio.move_on_after(at_most_seconds) as scope:
            await trio.lowlevel.wait_readable(self._fd)
        if scope.cancelled_caught:
            return False
        # What happened does not matter: a pass looks at everything.
        try:
            while os.read(self._fd, _READ_BYTES):
                pass
        except BlockingIOError:
            return True
        return True
