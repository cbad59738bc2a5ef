"""Files on the node, written so that a crash or a full disk leaves the old one or the new one.

A temporary file beside the target is filled, synced and renamed, and the folder is synced (the
reference does not sync and ignores a failed copy, cni.md 11 D1). The names of temporary files
have no ending that a container runtime reads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from cni.install.errors import ConflistError

CONF_ENDINGS = (".conf", ".conflist")
CONF_BYTES_MAX = 1024 * 1024  # real ones have a few hundred bytes
_TEMPORARY = ".tmp."


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Put `data` at `path`, all of it or nothing.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def move_file(source: Path, target: Path) -> None:
    """Rename a file within its folder, over another if there is one.

    Raises:
        OSError: it could not be renamed.
    """
    source.replace(target)
    sync_folder(target.parent)


def delete_file(path: Path) -> None:
    """Remove a file that may be gone already.

    Raises:
        OSError: it could not be removed.
    """
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def mode_of(path: Path) -> int | None:
    """Give the permissions of a file; None if there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash.

    Raises:
        OSError: the disk refuses.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_confs(folder: Path, *, saved_ending: str) -> dict[str, bytes]:
    """Read the runtime's configurations, and those that we have put aside, by name.

    Raises:
        ConflistError: the folder or one of the files cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        for path in sorted(folder.iterdir()):
            is_ours = path.name.endswith((*CONF_ENDINGS, saved_ending)) and path.is_file()
            if is_ours and path.stat().st_size <= CONF_BYTES_MAX:
                found[path.name] = path.read_bytes()
    except FileNotFoundError:
        # Gone between listing and reading, or not there yet: whatever makes it there wakes us.
        return found
    except OSError as exc:
        raise ConflistError(f"cannot read {folder}: {exc}") from exc
    return found


def delete_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files that a killed process left for `name`.

    Raises:
        OSError: one of them could not be removed.
    """
    for path in folder.glob(f"{name}{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
