"""The traffic secrets of handshakes, as the `ssl` module tells them (performance.md 14).

`ssl` reveals them in one way only: it appends lines to the file named by `keylog_filename`. Ours is
a memfd: close-on-exec, on no disk, and, other than a pipe, it can never fill up and block the whole
process inside a handshake. It is emptied after every step of every handshake, so what it holds then
belongs to the handshake that just moved.
"""

from __future__ import annotations

import os
import ssl

READ_BYTES = 64 * 1024  # one step of a handshake writes five lines of about 200 bytes
LABELS = (b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0")


class KeyLog:
    """Collects secrets from one or more contexts; nothing else may log to it."""

    __slots__ = ("_fd",)

    _close_fd = staticmethod(os.close)  # when the interpreter ends, modules go before objects

    def __init__(self) -> None:
        self._fd = os.memfd_create("keylog", os.MFD_CLOEXEC)

    def attach(self, context: ssl.SSLContext) -> None:
        """Have `context` write here; it keeps a descriptor of its own."""
        context.keylog_filename = f"/proc/self/fd/{self._fd}"

    def drain(self) -> list[tuple[bytes, bytes, bytes]]:
        """Take what was logged since the last time and empty the log.

        Returns label, client random (hexadecimal) and secret of each application traffic secret.
        """
        text = os.pread(self._fd, READ_BYTES, 0)
        if not text:
            return []
        os.ftruncate(self._fd, 0)
        found = []
        for line in text.splitlines():
            fields = line.split()
            if len(fields) == len(("label", "random", "secret")) and fields[0] in LABELS:
                found.append((fields[0], fields[1], bytes.fromhex(fields[2].decode())))
        return found

    def close(self) -> None:
        """Release the descriptor; contexts that are attached must not be used any more."""
        if self._fd >= 0:
            self._close_fd(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()
