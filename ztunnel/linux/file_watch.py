"""Noticing that a file has changed, and that whoever writes it has finished.

Looking costs one `stat` and, other than inotify, works on every file system and through Kubernetes'
exchange of symbolic links; a second more or less is nothing beside the minute that a kubelet takes
to bring a new file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one version of a file from another."""

    device: int
    inode: int
    size: int
    changed_ns: int


class FileWatch:
    """Follows what lies at `path`, from when it is made: make it before the file is read first."""

    def __init__(
        self, path: Path, *, settle_seconds: float, look_seconds: float = LOOK_SECONDS
    ) -> None:
        """Take note of what is there; blocks for as long as the file system takes."""
        self.path = path
        self._settle_seconds = settle_seconds
        self._look_seconds = look_seconds
        self._seen = self._stamp()

    async def changed(self) -> None:
        """Wait until there is something else, or nothing, and it has stayed so for a while."""
        while True:
            await trio.sleep(self._look_seconds)
            stamp = await trio.to_thread.run_sync(self._stamp)
            if stamp != self._seen:
                self._seen = await self._settled(stamp)
                return

    async def _settled(self, stamp: _Stamp | None) -> _Stamp | None:
        """Wait until nobody writes any more, or a Kubernetes volume is whole."""
        while True:
            await trio.sleep(self._settle_seconds)
            now = await trio.to_thread.run_sync(self._stamp)
            if now == stamp:
                return now
            stamp = now

    def _stamp(self) -> _Stamp | None:
        """Look at what the path leads to; None if there is nothing."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
