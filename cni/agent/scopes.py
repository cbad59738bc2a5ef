"""The scopes of the log, by the reference's names: what an operator gives a level (cni.md 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ztunnel.telemetry.filter import Level, LogFilter
from ztunnel.telemetry.log import Pipeline

AGENT_TARGET, PLUGIN_TARGET, OTHER_TARGET = "cni", "cni-plugin", ""
AGENT, PLUGIN, DEFAULT = "cni-agent", "cni-plugin", "default"
EVERY_SCOPE = "all"  # only when levels are listed

# The reference has no more of them; `fatal` is for lists, and nothing of ours is fatal.
LEVELS: Mapping[str, Level] = {
    "debug": Level.DEBUG,
    "info": Level.INFO,
    "warn": Level.WARN,
    "error": Level.ERROR,
    "none": Level.OFF,
}
_LISTED_LEVELS = {**LEVELS, "fatal": Level.OFF}


@dataclass(frozen=True, slots=True)
class Scope:
    """A part of the log. `target`: of its lines, and what their targets begin with."""

    name: str
    description: str
    target: str

    def level_in(self, log_filter: LogFilter) -> str:
        """Name the level at which a filter logs this part."""
        if self.target == OTHER_TARGET:
            level = log_filter.directives.get(self.target, Level.ERROR)
        else:
            level = log_filter.level_for(self.target)
        return next((name for name, one in LEVELS.items() if one >= level), "none")


SCOPES: Mapping[str, Scope] = {
    scope.name: scope
    for scope in (
        Scope(AGENT, "the node agent and the installer", AGENT_TARGET),
        Scope(PLUGIN, "what plugins say, shown by the agent", PLUGIN_TARGET),
        Scope(DEFAULT, "whatever has no level of its own", OTHER_TARGET),
    )
}


class LogScopes:
    """Reads and changes the levels of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def level_of(self, scope: Scope) -> str:
        """Name the level that a scope has now."""
        return scope.level_in(self._pipeline.filter)

    def change(self, scope: Scope, level: Level) -> None:
        """Give a scope a level, from the next line on; finer directives in it end."""
        self._pipeline.cover(scope.target, level)


@dataclass(frozen=True, slots=True)
class LevelList:
    """Levels as `--log_output_level` lists them, in that order."""

    levels: tuple[tuple[Scope, Level], ...] = ()
    unknown: tuple[str, ...] = ()  # scopes of the reference's that we lack

    @classmethod
    def parse(cls, text: str) -> LevelList:
        """Read `scope:level,...`; a level alone is for `default`, and `all` for each scope.

        Raises:
            ValueError: a level is not one.
        """
        levels: list[tuple[Scope, Level]] = []
        unknown = []
        for part in text.split(",") if text else ():
            name, colon, word = part.strip().partition(":")
            if not colon:
                name, word = DEFAULT, name
            if word not in _LISTED_LEVELS:
                known = ", ".join(_LISTED_LEVELS)
                raise ValueError(f"{part.strip()!r} has no level; write scope:level, of {known}")
            if name == EVERY_SCOPE:
                levels += [(scope, _LISTED_LEVELS[word]) for scope in SCOPES.values()]
            elif name in SCOPES:
                levels.append((SCOPES[name], _LISTED_LEVELS[word]))
            else:
                unknown.append(name)
        return cls(tuple(levels), tuple(unknown))

    def apply(self, scopes: LogScopes) -> None:
        """Give each scope its level."""
        for scope, level in self.levels:
            scopes.change(scope, level)

    def plugin_level(self) -> str | None:
        """Name the level that the plugin is to be told; None if it is not listed."""
        found = [level for scope, level in self.levels if scope.name == PLUGIN]
        return next(name for name, level in LEVELS.items() if level == found[-1]) if found else None
