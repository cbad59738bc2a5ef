"""Which processes make up a contender, and what they hold and use, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

KIB_PER_MIB = 1024


def family(pid: int) -> list[int]:
    """Give a process and its children, which are the data paths of one that has several."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [pid, *map(int, children.split())]


def resident_kib(pid: int) -> int:
    """Give all of a process that lies in memory, its program's pages too."""
    return _status(pid, "VmRSS")


def private_kib(pid: int) -> int:
    """Give what it has allocated: in memory, and not from any file."""
    return _status(pid, "RssAnon")


def cpu_seconds(pid: int) -> float:
    """Give the CPU time that all its threads have had, as the scheduler counts it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(one.read_text().split()[0]) for one in tasks) / 1e9


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/status has no {name}")
