"""What a process holds, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

KIB_PER_MIB = 1024


def resident_kib(pid: int) -> int:
    """Give all of a process that lies in memory, its program's pages too."""
    return _status(pid, "VmRSS")


def private_kib(pid: int) -> int:
    """Give what it has allocated: in memory, and not from any file."""
    return _status(pid, "RssAnon")


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/status has no {name}")
