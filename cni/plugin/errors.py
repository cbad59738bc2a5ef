"""Why a CNI command fails, as the container runtime wants to hear it (CNI spec 1.1.0, "Error")."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Numbers of the CNI specification, and from 100 on our own."""

    INCOMPATIBLE_VERSION = 1
    BAD_ENVIRONMENT = 4
    IO_FAILURE = 5
    UNDECODABLE = 6
    BAD_CONFIG = 7
    BAD_NETNS = 8
    TRY_AGAIN_LATER = 11
    AGENT_REFUSED = 100
    INTERNAL = 999


class PluginError(Exception):
    """Foreseen; the command fails, and the runtime shows `message` and `details` to people."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
