"""Whether an agent that is told to stop takes the plugin along (cni.md 2.5).

While an agent is replaced or the node reboots, the plugin stays and pods of the mesh wait: none may
start unprotected. When the agent is uninstalled, a plugin that stays would stop every pod for ever.
The agent's own DaemonSet tells the two apart, if it can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

RETRIES_MAX = 2  # a second apart; kubelet gives us 30 s in all
RETRY_SECONDS = 1.0


class Answer(Enum):
    """What Kubernetes says about the agent's DaemonSet."""

    WANTED = auto()  # it is there, stays, and wants an agent on this node
    NOT_HERE = auto()  # it is there, and no longer wants one on this node
    GOING = auto()  # it is deleted, or being deleted
    UNAUTHORIZED = auto()  # our permissions are gone: so is the DaemonSet, by uninstalling
    UNKNOWN = auto()  # nobody answers


class Verdict(Enum):
    """What to do with the plugin."""

    CLEAN_UP = auto()
    LEAVE = auto()
    ASK_AGAIN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownRules:
    """What the operator chose that matters here."""

    ambient_enabled: bool
    safe_upgrade_disabled: bool
    has_own_file: bool

    def needs_answer(self) -> bool:
        """Whether Kubernetes has to be asked at all."""
        return self.ambient_enabled and not self.safe_upgrade_disabled


def decide_shutdown(rules: ShutdownRules, answer: Answer, *, asked: int) -> Verdict:
    """Say what to do, given the answer to the question asked `asked` times so far."""
    if not rules.needs_answer():
        return Verdict.CLEAN_UP
    match answer:
        case Answer.WANTED:
            return Verdict.LEAVE
        case Answer.NOT_HERE | Answer.GOING | Answer.UNAUTHORIZED:
            return Verdict.CLEAN_UP
        case Answer.UNKNOWN if not rules.has_own_file:
            # As the reference: a chain shared with others must not stay blocked because nobody
            # could be asked. An agent that comes back puts us in again.
            return Verdict.CLEAN_UP
        case Answer.UNKNOWN:
            return Verdict.ASK_AGAIN if asked <= RETRIES_MAX else Verdict.LEAVE
