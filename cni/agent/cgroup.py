"""Whose process it is, by its control groups (cni.md 3.7). Pure.

Runtimes and cgroup drivers name the groups of a pod's containers in many ways. Common to them: a
part `pod` with the pod's uid, whose groups of hex digits may be joined by any punctuation, and
after it, last, the container's id.
"""

from __future__ import annotations

import re

from ztunnel.model.workload import PodUid

_P = r"[^A-Za-z0-9]"  # punctuation
_UID = f"{_P}?".join(f"([0-9a-f]{{{digits}}})" for digits in (8, 4, 4, 4, 12))
_POD_AND_CONTAINER = re.compile(rf"{_P}pod{_UID}{_P}(?:.*{_P})?([0-9A-Za-z]+)")
_SCOPE = ".scope"
TEXT_CHARS_MAX = 65536  # a hierarchy per controller, and paths of 4096 at most


def pod_uid(text: str) -> PodUid | None:
    """Read `/proc/<pid>/cgroup`; None if the process is in no pod, or in more than one."""
    found = {match for line in text[:TEXT_CHARS_MAX].splitlines() if (match := _of_line(line))}
    uids = {uid for uid, _ in found}
    containers = {container for _, container in found}
    if len(uids) != 1 or len(containers) != 1:
        return None
    return PodUid(uids.pop())


def _of_line(line: str) -> tuple[str, str] | None:
    """Read the pod's uid and the container's id of `hierarchy:controllers:path`."""
    _, _, rest = line.partition(":")
    path = rest.partition(":")[2].removesuffix(_SCOPE)
    match = _POD_AND_CONTAINER.search(path)
    if match is None or match.end() != len(path):
        return None
    return "-".join(match.groups()[:5]), match[6]
