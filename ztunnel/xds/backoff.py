"""How long to wait before the control plane is called again (state-and-xds.md 4.5 and 16.1).

The reference waits without jitter, and not at all after a clean close; so all nodes come back in
step when a control plane restarts, and a server that closes at once is called in a hot loop.
"""

from __future__ import annotations

from random import Random

FLOOR_SECONDS = 0.05  # never less, whatever the dice say
FIRST_SECONDS = 0.5
MAX_SECONDS = 15.0  # as the reference
# A stream that lived this long shows that the server is well: begin with short waits again.
HEALTHY_SECONDS = 10.0


class Backoff:
    """Doubling waits with full jitter: between the floor and a ceiling that doubles."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._ceiling = FIRST_SECONDS

    def after(self, lived_seconds: float) -> float:
        """Return how many seconds to wait after a stream that lived for so long (0: never)."""
        if lived_seconds >= HEALTHY_SECONDS:
            self._ceiling = FIRST_SECONDS
        wait = self._rng.uniform(FLOOR_SECONDS, self._ceiling)
        self._ceiling = min(2 * self._ceiling, MAX_SECONDS)
        return wait
