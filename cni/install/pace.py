"""How eagerly to repair what somebody else keeps undoing (cni.md 2.4).

Two programs that each restore their own version of one file would rewrite it for ever. We go on,
since pods would start unprotected otherwise, but not faster than once a second, and say who may
be at it.
"""

from __future__ import annotations

QUICK_SECONDS = 5.0  # repairs closer together than this look like a fight
WAIT_SECONDS = 1.0
QUICK_REPAIRS_MAX = 5


class RepairPace:
    """Watches how often files had to be repaired. `now` is any clock in seconds."""

    __slots__ = ("_last", "_quick")

    def __init__(self) -> None:
        self._last: float | None = None
        self._quick = 0

    def repaired(self, now: float) -> float:
        """Note a repair and give how many seconds to wait before looking again."""
        is_quick = self._last is not None and now - self._last < QUICK_SECONDS
        self._quick = self._quick + 1 if is_quick else 0
        self._last = now
        return WAIT_SECONDS if is_quick else 0.0

    @property
    def is_fight(self) -> bool:
        """Whether somebody keeps undoing our work."""
        return self._quick > QUICK_REPAIRS_MAX


def suspect(conf_names: list[str]) -> str:
    """Say what may be undoing our work, as far as the names of configurations tell."""
    if any("cilium" in name for name in conf_names):
        return "Cilium removes other configurations unless cni.exclusive is false"
    return "another program restores the CNI configuration"
