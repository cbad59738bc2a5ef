"""Which user the kubelet runs as (cni.md 5.3)."""

from __future__ import annotations

import os
from pathlib import Path

_NAMES = frozenset({"kubelet", "k3s", "k3s-server", "k3s-agent"})
_MANY_IN_ONE = "kubelite"  # MicroK8s: a kubelet only if an argument says so


def kubelet_uid(proc: Path) -> int | None:
    """Find the kubelet among all processes; None if there is none.

    It blocks: call it from a thread.
    """
    try:
        pids = sorted((name for name in os.listdir(proc) if name.isdigit()), key=int)  # noqa: PTH208
    except OSError:
        return None
    for pid in pids:
        try:
            if _is_kubelet(proc / pid):
                return (proc / pid).stat().st_uid
        except OSError:  # it has ended meanwhile
            continue
    return None


def _is_kubelet(folder: Path) -> bool:
    name = (folder / "comm").read_bytes().strip().decode("utf-8", "replace")
    if name == _MANY_IN_ONE:
        return b"kubelet" in (folder / "cmdline").read_bytes()
    return name in _NAMES
