"""Which log lines are wanted, by level and target (dns-and-observability.md 3.1).

A filter is a comma list of `<level>` and `<target>=<level>`. The most specific directive decides;
a target nobody names is logged at `error`, so that no filter hides a call for help by accident.
Unlike the reference, `<target>:<level>` works too, as its own help text and istioctl advertise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

CRATE = "ztunnel::"  # reference targets start with it; ours leave it out, filters may have it
ACCESS = "access"
FILTER_CHARS_MAX = 4096

_ROOTS = {ACCESS, "ztunnel", "cni", "cni-plugin"}
_TARGET = re.compile(r"[A-Za-z0-9_.-]+(::[A-Za-z0-9_.-]+)*")
_LAST_SINGLE_COLON = re.compile(r"(?<!:):(?!:)(?=[^:]*$)")


class Level(IntEnum):
    """How bad it is; also a threshold. Values up to ERROR are those of the standard library."""

    TRACE = 5
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40
    OFF = 100

    @property
    def label(self) -> str:
        """The level as lines and filters spell it."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a level in any letter case; `warning` and `critical` are taken too.

        Raises:
            ValueError: it is not one.
        """
        aliases = {"WARNING": "WARN", "CRITICAL": "ERROR"}
        name = text.strip().upper()
        try:
            return cls[aliases.get(name, name)]
        except KeyError:
            levels = ", ".join(level.label for level in reversed(cls))
            raise ValueError(f"invalid log level {text!r}; write one of {levels}") from None


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Directives by target; the empty target is the default."""

    directives: Mapping[str, Level]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a filter; later directives win over earlier ones for the same target.

        Raises:
            ValueError: a directive is wrong; the message names it.
        """
        if len(text) > FILTER_CHARS_MAX:
            raise ValueError(f"log filter is longer than {FILTER_CHARS_MAX} characters")
        parts = [part.strip() for part in text.split(",")]
        return cls(dict(_directive(part) for part in parts if part))

    def merged(self, more: LogFilter) -> LogFilter:
        """Give this filter plus the directives of `more`, which win."""
        return LogFilter({**self.directives, **more.directives})

    def covered(self, target: str, level: Level) -> LogFilter:
        """Give this filter with one level for `target` and all below; "" is what nobody names."""
        others = {
            name: other
            for name, other in self.directives.items()
            if not (target and _is_below(name, target))
        }
        return LogFilter({**others, target: level})

    def level_for(self, target: str) -> Level:
        """Find the level of `target` (without `ztunnel::`)."""
        full = full_target(target)
        best, level = -1, Level.ERROR
        for name, wanted in self.directives.items():
            specific = _depth(name)
            covers = not name or _is_below(full, name) or _is_below(target, name)
            if covers and specific > best:
                best, level = specific, wanted
        return level

    def __str__(self) -> str:
        ordered = sorted(self.directives.items(), key=lambda item: (-_depth(item[0]), item[0]))
        return ",".join(f"{name}={level.label}" if name else level.label for name, level in ordered)


def full_target(target: str) -> str:
    """Give the target with its full path, as the reference's JSON lines have it."""
    root = target.partition("::")[0]
    return target if root in _ROOTS else CRATE + target


def _directive(part: str) -> tuple[str, Level]:
    target, equals, level = part.rpartition("=")
    if not equals and (colon := _LAST_SINGLE_COLON.search(part)):
        target, level = part[: colon.start()], part[colon.end() :]
    elif not equals:
        return "", Level.parse(part)
    if not _TARGET.fullmatch(target.strip()):
        raise ValueError(f"invalid log target {target!r} in {part!r}")
    return target.strip(), Level.parse(level)


def _is_below(target: str, name: str) -> bool:
    return target == name or target.startswith(name + "::")


def _depth(name: str) -> int:
    """Say how specific a directive is; `ztunnel` beats only the default."""
    return 1 if name == "ztunnel" else 2 * len(name.removeprefix(CRATE))
