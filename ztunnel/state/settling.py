"""Keeps the garbage collector off what the control plane told us, which lives long."""

from __future__ import annotations

import gc

# Left to itself, the collector would walk over all of it again and again while it arrives: stalls
# of 10 ms and more (performance.md 9).
FREEZE_RESOURCES = 2000
LARGE_SLICE = 16  # fewer at a time are everyday changes


class Settling:
    """Counts what arrives, and takes it out of the collector's sight in large portions."""

    def __init__(self) -> None:
        self._fresh = 0  # resources since the last freeze

    def came(self, resources: int) -> None:
        """Note a slice of resources, already in the store.

        Small ones stay in sight: freezing often would also keep other tasks' garbage for ever.
        """
        if resources >= LARGE_SLICE:
            self._fresh += resources
        if self._fresh >= FREEZE_RESOURCES:
            self._fresh = 0
            gc.freeze()
