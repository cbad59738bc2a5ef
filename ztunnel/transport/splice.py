"""Moving bytes from socket to socket inside the kernel, for connections that move many.

A pipe costs two descriptors and a few system calls to make, so it is worth it only for a direction
that has shown itself busy (performance.md 8: 0.23 s of CPU per GB against 0.54 for copying).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Self

PIPE_BYTES = 1024 * 1024  # the most that an unprivileged process may ask for by default
WORTH_BYTES = 256 * 1024  # what a direction must have moved before it gets a pipe


class SplicePipe:
    """A pipe between two sockets of one direction; `held` bytes are in it."""

    __slots__ = ("_read_fd", "_write_fd", "held")

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self.held = 0

    @classmethod
    def make(cls) -> Self | None:
        """Make one; None when there are no descriptors left: then copying goes on."""
        try:
            read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        # When the user's pipe pages are used up, a smaller pipe works as well.
        with contextlib.suppress(OSError):
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return cls(read_fd, write_fd)

    def fill(self, source: int) -> int:
        """Take what the socket `source` has; 0 is its end.

        Raises:
            BlockingIOError: it has nothing.
            OSError: it broke.
        """
        taken = os.splice(source, self._write_fd, PIPE_BYTES)
        self.held += taken
        return taken

    def drain(self, target: int) -> int:
        """Give the socket `target` what is held, as far as it takes it.

        Raises:
            BlockingIOError: it takes nothing.
            OSError: it broke.
        """
        given = os.splice(self._read_fd, target, self.held)
        self.held -= given
        return given

    def close(self) -> None:
        """Let go of the pipe and of what is in it."""
        os.close(self._read_fd)
        os.close(self._write_fd)
