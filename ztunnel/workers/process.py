"""Starting a worker's process, and how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from typing import Self

import trio

from ztunnel.transport.sockets import Socket, local_pair

OUTPUT_BYTES = 256 * 1024  # read at once: four hundred lines
PIPE_BYTES = 1024 * 1024  # what any process may ask for
WORDS = ("-m", "ztunnel", "worker")


class WorkerProcess:
    """A running process: `link` is our end of its standard input."""

    def __init__(self, link: Socket, popen: subprocess.Popen[bytes]) -> None:
        """Take over what `start` made."""
        self.link = link
        self._popen = popen
        assert popen.stdout is not None
        self._output = popen.stdout.fileno()
        os.set_blocking(self._output, False)
        with contextlib.suppress(OSError):  # a smaller pipe does too
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._pidfd = os.pidfd_open(popen.pid)

    @classmethod
    def start(cls) -> Self:
        """Start a worker that prints to a pipe.

        On the calling thread, which the worker will not outlive: so not in a pool of threads. It
        holds up the loop for about a millisecond, but not the data path, which is elsewhere.

        Raises:
            OSError: out of processes, descriptors or memory.
        """
        ours, theirs = local_pair()
        try:
            with theirs:
                popen = subprocess.Popen(  # noqa: S603 - ourselves
                    [sys.executable, *WORDS],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                )
        except OSError:
            ours.close()
            raise
        return cls(ours, popen)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    async def wait(self) -> None:
        """Wait until it has ended."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def kill(self) -> None:
        """End it now; one that has ended already is fine."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def read_now(self) -> bytes | None:
        """Give output that is there; None if there is none yet, b"" at its end."""
        try:
            return os.read(self._output, OUTPUT_BYTES)
        except BlockingIOError:
            return None

    async def read(self) -> bytes:
        """Wait for output; b"" is its end."""
        while (data := self.read_now()) is None:
            await trio.lowlevel.wait_readable(self._output)
        await trio.lowlevel.checkpoint()
        return data

    def close(self) -> str:
        """Let go of a process that has ended; return how it did."""
        status = self._popen.wait()
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        os.close(self._pidfd)
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"
