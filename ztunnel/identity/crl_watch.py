"""Keeps the revocation lists those of a file (dataplane.md 7.5).

The file is looked at once a second and read when what lies at its path has changed and then been
left alone for two. Looking costs one `stat` and, other than inotify, works on every file system and
through Kubernetes' exchange of symbolic links; a second more or less is nothing beside the minute
that a kubelet takes to bring a new file. A file that is invalid, also at the start, leaves the
lists in force as they are and is tried again after each change: checking is never switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from ztunnel.tls.crl import FILE_BYTES_MAX, Revocations, parse_lists

log = structlog.get_logger()

LOOK_SECONDS = 1.0
SETTLE_SECONDS = 2.0  # as the reference


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one version of a file from another."""

    device: int
    inode: int
    size: int
    changed_ns: int


class CrlWatch:
    """Reads one file into `revocations`; `on_load` hears whether an attempt went well."""

    def __init__(
        self,
        path: Path,
        revocations: Revocations,
        *,
        look_seconds: float = LOOK_SECONDS,
        settle_seconds: float = SETTLE_SECONDS,
        on_load: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._revocations = revocations
        self._look_seconds = look_seconds
        self._settle_seconds = settle_seconds
        self._on_load = on_load
        self._seen: _Stamp | None = None

    def load(self) -> bool:
        """Read the file now; say whether the lists in force are the file's.

        Blocks for as long as the file system takes; used once before anything is served.
        """
        is_loaded = self._load()
        self._on_load(is_loaded)
        return is_loaded

    def _load(self) -> bool:
        self._seen = self._stamp()
        try:
            with self._path.open("rb") as file:
                lists = parse_lists(file.read(FILE_BYTES_MAX + 1))
        except FileNotFoundError:
            log.warning("revocation list not there yet", path=str(self._path))
            return False
        except (OSError, ValueError) as exc:
            log.warning("revocation list not usable", path=str(self._path), error=str(exc))
            return False
        self._revocations.replace(lists)
        log.info(
            "revocation list loaded",
            path=str(self._path),
            lists=len(lists),
            revoked=sum(len(one.serials) for one in lists),
        )
        return True

    async def run(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await trio.sleep(self._look_seconds)
            stamp = await trio.to_thread.run_sync(self._stamp)
            if stamp == self._seen:
                continue
            await self._settled(stamp)
            self.load()

    async def _settled(self, stamp: _Stamp | None) -> None:
        """Wait until nobody writes any more, or a Kubernetes volume is whole."""
        while True:
            await trio.sleep(self._settle_seconds)
            now = await trio.to_thread.run_sync(self._stamp)
            if now == stamp:
                return
            stamp = now

    def _stamp(self) -> _Stamp | None:
        """Look at what the path leads to; None if there is nothing."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
