"""Where on the host a folder is that is mounted into our container (proc(5), mountinfo).

Loader and libraries are named by absolute paths, and so is the interpreter in the plugin's first
line. The runtime follows them on the host, where the folder of plugins is at a place that charts
choose and the container is not told (daemonset.md 6). Both kernel tables together say it: ours,
which part of which file system is mounted here; the host's, where that file system is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import itemgetter

from cni.install.errors import BundleError

_FIELDS_MIN = 6  # the optional ones and what follows them do not matter here
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class _Mount:
    """One line of mountinfo."""

    device: str
    root: str  # the part of the file system that is mounted
    point: str  # where
    options: frozenset[str]


def host_path_of(folder: str, *, own: str, host: str) -> str:
    """Give the host's path of `folder`, from the container's and the host's mountinfo.

    Raises:
        BundleError: the folder is not a mount of its own, or the host does not have it mounted
            where programs may be run.
    """
    here = [mount for mount in _parse(own) if mount.point == folder.rstrip("/")]
    if not here:
        raise BundleError(f"{folder} is not mounted from the host")
    mounted = here[-1]  # the last one hides the others
    candidates = [
        (len(mount.root), _join(mount.point, rest))
        for mount in _parse(host)
        if mount.device == mounted.device
        and "noexec" not in mount.options
        and (rest := _below(mounted.root, mount.root)) is not None
    ]
    if not candidates:
        raise BundleError(f"{folder}: the host has it nowhere that programs may be run from")
    # The mount that shows the least of the file system is the one made for the purpose; among
    # equals the first one, as later ones may be somebody's temporary view.
    return max(candidates, key=itemgetter(0))[1]


def _below(path: str, root: str) -> str | None:
    """Give the part of `path` below `root`; None if it is not below it."""
    if path == root:
        return ""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _join(point: str, rest: str) -> str:
    return f"{point.rstrip('/')}/{rest}".rstrip("/") or "/"


def _parse(table: str) -> list[_Mount]:
    lines = (line.split(" ") for line in table.splitlines())
    return [
        _Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), _options(fields[5]))
        for fields in lines
        if len(fields) >= _FIELDS_MIN
    ]


def _options(text: str) -> frozenset[str]:
    return frozenset(text.split(","))


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes for white space and backslashes."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
