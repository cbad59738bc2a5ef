"""When to ask a silent peer whether it is still there, and when to believe that it is not.

Data counts as a sign of life, so a busy tunnel is never pinged (dataplane.md 6.5 and 17.47).
"""

from __future__ import annotations

from enum import Enum, auto

PING_SECONDS = 10.0  # between two ticks, dataplane.md 6.5
TICKS_TO_LIVE = 2  # after the question: 20 s
PING_PAYLOAD = b"ztunnel\0"


class Pulse(Enum):
    """What a tick found."""

    FINE = auto()
    ASK = auto()  # silent since the last tick: send a ping
    WAIT = auto()  # asked, no answer yet
    GONE = auto()


class Heartbeat:
    """One connection's pulse; set `heard` whenever bytes came."""

    __slots__ = ("_silent_ticks", "heard")

    def __init__(self) -> None:
        self.heard = True
        self._silent_ticks = 0

    def tick(self) -> Pulse:
        """Judge, every `PING_SECONDS`."""
        if self.heard:
            self.heard = False
            self._silent_ticks = 0
            return Pulse.FINE
        self._silent_ticks += 1
        if self._silent_ticks == 1:
            return Pulse.ASK
        return Pulse.GONE if self._silent_ticks > TICKS_TO_LIVE else Pulse.WAIT
