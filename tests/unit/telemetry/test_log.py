from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog

from ztunnel.errors import ConfigError
from ztunnel.telemetry.filter import Level
from ztunnel.telemetry.log import Pipeline, get
from ztunnel.telemetry.writer import LineWriter

TIME = "2026-01-02T03:04:05.000678Z"


class Memory(LineWriter):
    """Keeps lines instead of writing them."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def a_pipeline() -> tuple[Pipeline, list[str]]:
    writer = Memory()
    return Pipeline(writer=writer, clock_ns=lambda: 1767323045_000678_000), writer.lines


@contextmanager
def a_pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_plain_line_with_bound_fields_and_spans() -> None:
    pipeline, lines = a_pipeline()
    log = pipeline.get("proxy::inbound").bind(pod="web-0").span("proxy", wl="shop/web-0")
    log.info("tunnel opened", bytes=3)
    assert lines == [
        f'{TIME}\tinfo\tproxy::inbound:proxy{{wl=shop/web-0}}\ttunnel opened\tpod="web-0" bytes=3\n'
    ]


def test_a_json_line() -> None:
    pipeline, lines = a_pipeline()
    pipeline.set_up("info", json=True)
    pipeline.get("xds").warning("stream lost", error="x")
    assert json.loads(lines[0]) == {
        "level": "warn",
        "time": TIME,
        "scope": "ztunnel::xds",
        "message": "stream lost",
        "error": "x",
    }


def test_an_exception_is_one_line_with_its_traceback() -> None:
    pipeline, lines = a_pipeline()
    try:
        int("boom")
    except ValueError:
        pipeline.get("app").exception("failed")
    (line,) = lines
    assert line.split("\t")[1] == "error"
    assert len(line.splitlines()) == 1
    assert "ValueError: invalid literal" in line


@pytest.mark.parametrize(
    ("filter_text", "seen"),
    [
        ("trace", ["trace", "debug", "info", "warn", "error"]),
        ("info", ["info", "warn", "error"]),
        ("error", ["error"]),
        ("off", []),
        ("off,a=warn", ["warn", "error"]),
    ],
)
def test_the_filter_decides_which_levels_are_seen(filter_text: str, seen: list[str]) -> None:
    pipeline, lines = a_pipeline()
    pipeline.set_up(filter_text, json=False)
    log = pipeline.get("a")
    log.trace("m")
    log.debug("m")
    log.info("m")
    log.warning("m")
    log.error("m")
    assert [line.split("\t")[1] for line in lines] == seen


def test_a_change_reaches_loggers_that_exist_already() -> None:
    pipeline, lines = a_pipeline()
    log = pipeline.get("xds::client").bind(a=1)
    log.debug("hidden")
    assert not log.is_enabled(Level.DEBUG)
    assert str(pipeline.change("xds=debug")) == "xds=debug,info"
    log.debug("seen")
    assert log.is_enabled(Level.DEBUG)
    assert [line.split("\t")[3] for line in lines] == ["seen"]


def test_a_part_can_be_given_one_level() -> None:
    pipeline, lines = a_pipeline()
    pipeline.set_up("info,xds::client=off", json=False)
    log = pipeline.get("xds::client")
    log.info("hidden")
    pipeline.cover("xds", Level.DEBUG)
    log.debug("seen")
    pipeline.get("proxy").debug("hidden")
    assert [line.split("\t")[3] for line in lines] == ["seen"]


def test_reset_goes_back_to_the_start() -> None:
    pipeline, _ = a_pipeline()
    pipeline.set_up("warn", json=False)
    pipeline.change("xds=debug,info")
    assert str(pipeline.change(reset=True)) == "warn"
    assert str(pipeline.change("a=off", reset=True)) == "a=off,warn"


def test_a_wrong_change_changes_nothing() -> None:
    pipeline, _ = a_pipeline()
    with pytest.raises(ValueError, match="loud"):
        pipeline.change("loud", reset=True)
    assert str(pipeline.filter) == "info"


def test_a_wrong_start_filter_is_a_startup_error() -> None:
    pipeline, _ = a_pipeline()
    with pytest.raises(ConfigError, match=r"invalid env var RUST_LOG=loud \(.*; write"):
        pipeline.set_up("loud", json=False)


def test_structlog_loggers_go_the_same_way() -> None:
    with structlog.testing.capture_logs() as entries:
        structlog.get_logger(component="x").info("one", a=1)
        get("xds").bind(b=2).warning("two")
    assert entries == [
        {"component": "x", "a": 1, "event": "one", "log_level": "info"},
        {"b": 2, "event": "two", "log_level": "warning"},
    ]


def test_a_line_is_written_at_once_when_no_loop_runs() -> None:
    with a_pipe() as (reader, writer):
        pipeline = Pipeline(writer=LineWriter(writer), clock_ns=lambda: 0)
        pipeline.get("a").info("hello")
        assert os.read(reader, 100) == b"1970-01-01T00:00:00.000000Z\tinfo\ta\thello\t\n"


def test_lost_lines_are_reported() -> None:
    pipeline, _ = a_pipeline()
    assert pipeline.writer.report is not None
    assert pipeline.writer.report(7) == f"{TIME}\twarn\ttelemetry\tlog lines dropped\tlines=7\n"
