from __future__ import annotations

import pytest

from cni.agent.scopes import LEVELS, SCOPES, LevelList, LogScopes
from tests.unit.telemetry.test_log import a_pipeline
from ztunnel.telemetry.filter import Level

AGENT, PLUGIN, DEFAULT = SCOPES.values()


def levels_of(scopes: LogScopes) -> list[str]:
    return [scopes.level_of(scope) for scope in SCOPES.values()]


@pytest.mark.parametrize(
    ("start", "levels"),
    [
        ("info", ["info", "info", "info"]),
        ("warn,cni=debug", ["debug", "warn", "warn"]),
        ("cni=trace,cni-plugin=off", ["debug", "none", "error"]),
        ("info,ztunnel=debug", ["info", "info", "info"]),
    ],
)
def test_levels_are_those_of_the_filter(start: str, levels: list[str]) -> None:
    pipeline, _ = a_pipeline()
    pipeline.set_up(start, json=False)
    assert levels_of(LogScopes(pipeline)) == levels


def test_a_change_reaches_all_lines_of_the_scope_and_no_others() -> None:
    pipeline, lines = a_pipeline()
    pipeline.set_up("info,cni::agent::kube=off", json=False)
    targets = ["cni::agent::kube", "cni::install::installer", "cni-plugin", "other"]
    logs = [pipeline.get(target) for target in targets]

    def seen() -> list[str]:
        lines.clear()
        for log in logs:
            log.debug("line")
        return [line.split("\t")[2] for line in lines]

    scopes = LogScopes(pipeline)
    assert seen() == []
    scopes.change(AGENT, Level.DEBUG)
    assert seen() == targets[:2]
    scopes.change(AGENT, Level.INFO)
    scopes.change(PLUGIN, Level.DEBUG)
    assert seen() == ["cni-plugin"]
    scopes.change(DEFAULT, Level.DEBUG)
    assert seen() == ["cni-plugin", "other"]
    assert levels_of(scopes) == ["info", "debug", "debug"]


def test_each_level_can_be_given_and_is_read_back() -> None:
    pipeline, _ = a_pipeline()
    scopes = LogScopes(pipeline)
    for scope in SCOPES.values():
        for name, level in LEVELS.items():
            scopes.change(scope, level)
            assert scopes.level_of(scope) == name


@pytest.mark.parametrize(
    ("text", "levels", "plugin", "unknown"),
    [
        ("", ["info", "info", "info"], None, ()),
        ("debug", ["debug", "debug", "debug"], None, ()),
        ("default:warn, cni-agent:debug", ["debug", "warn", "warn"], None, ()),
        ("cni-plugin:fatal", ["info", "none", "info"], "none", ()),
        ("all:error,cni-agent:info", ["info", "error", "error"], "error", ()),
        ("grpc:none,default:info,cni:debug", ["info", "info", "info"], None, ("grpc", "cni")),
    ],
)
def test_a_list_of_levels_is_applied_in_its_order(
    text: str, levels: list[str], plugin: str | None, unknown: tuple[str, ...]
) -> None:
    pipeline, _ = a_pipeline()
    scopes = LogScopes(pipeline)
    wish = LevelList.parse(text)
    wish.apply(scopes)
    assert levels_of(scopes) == levels
    assert wish.plugin_level() == plugin
    assert wish.unknown == unknown


@pytest.mark.parametrize("text", ["loud", "cni-agent:", "cni-agent:loud", "a:b:debug", "info,"])
def test_what_is_no_level_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="has no level; write scope:level, of debug, info, warn"):
        LevelList.parse(text)
