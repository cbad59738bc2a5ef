"""Keeps the garbage collector off what the control plane told us, which lives long."""

from __future__ import annotations

import gc

# Left to itself, the collector would walk over all of it again and again while it arrives: stalls
# of 10 ms and more (performance.md 9). As many as this it does not notice: to look at those that
# are new takes as long as a turn has beside connections.
FREEZE_RESOURCES = 200
LARGE_CHANGE = 16  # fewer at a time are everyday changes


class Settling:
    """Counts what arrives, and takes it out of the collector's sight in large portions."""

    def __init__(self) -> None:
        self._together = 0  # resources of this change so far
        self._fresh = 0  # those of large ones since the last freeze

    def came(self, resources: int) -> None:
        """Note a part of a change, already in the store.

        Small changes stay in sight: freezing often would also keep other tasks' garbage for ever.
        """
        was_large = self._together >= LARGE_CHANGE
        self._together += resources
        if self._together < LARGE_CHANGE:
            return
        self._fresh += resources if was_large else self._together
        if self._fresh >= FREEZE_RESOURCES:
            self._fresh = 0
            gc.freeze()

    def ended(self) -> None:
        """Note that what comes next belongs to another change."""
        self._together = 0
