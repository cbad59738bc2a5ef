"""Keeps the revocation lists those of a file (dataplane.md 7.5).

The file is read when it has changed and then been left alone for two seconds. A file that is
invalid, also at the start, leaves the lists in force as they are and is tried again after each
change: checking is never switched off.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ztunnel.linux.file_watch import FileWatch
from ztunnel.tls.crl import FILE_BYTES_MAX, Revocations, parse_lists

log = structlog.get_logger()

SETTLE_SECONDS = 2.0  # as the reference


class CrlWatch:
    """Reads one file into `revocations`; `on_load` hears whether an attempt went well."""

    def __init__(
        self,
        watch: FileWatch,
        revocations: Revocations,
        *,
        on_load: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._watch = watch
        self._path = watch.path
        self._revocations = revocations
        self._on_load = on_load

    def load(self) -> bool:
        """Read the file now; say whether the lists in force are the file's.

        Blocks for as long as the file system takes; used once before anything is served.
        """
        is_loaded = self._load()
        self._on_load(is_loaded)
        return is_loaded

    def _load(self) -> bool:
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
            await self._watch.changed()
            self.load()
