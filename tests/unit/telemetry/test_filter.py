from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, strategies as st

from ztunnel.telemetry.filter import FILTER_CHARS_MAX, Level, LogFilter, full_target


def test_a_target_and_all_below_it_can_be_given_one_level() -> None:
    start = LogFilter.parse("info,a=warn,a::b=debug,ab=error,ztunnel=off")
    assert str(start.covered("a", Level.TRACE)) == "ab=error,a=trace,ztunnel=off,info"
    assert str(start.covered("", Level.WARN)) == "a::b=debug,ab=error,a=warn,ztunnel=off,warn"
    assert str(start.covered("c", Level.WARN)).startswith("a::b=debug,ab=error,a=warn,c=warn")


levels = st.sampled_from(list(Level))
targets = st.sampled_from(["", "a", "a::b", "access", "ztunnel::a", "ztunnel", "b.c"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("info", "info"),
        ("INFO", "info"),
        ("warning", "warn"),
        ("critical", "error"),
        ("access=debug,info", "access=debug,info"),
        ("info,access=debug", "access=debug,info"),
        ("access:debug", "access=debug"),
        ("a::b:debug", "a::b=debug"),
        ("a::b=debug", "a::b=debug"),
        ("ztunnel::proxy:trace", "ztunnel::proxy=trace"),
        ("a=warning", "a=warn"),
        ("a=info,a=off", "a=off"),
        (" a = info , warn ", "a=info,warn"),
        ("", ""),
        ("a=info,a::b=debug,error", "a::b=debug,a=info,error"),
    ],
)
def test_a_filter_is_read_and_shown_most_specific_first(text: str, shown: str) -> None:
    assert str(LogFilter.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["access", "a=", "=info", "a::b", "a=loud", "a b=info", "a:::info", "a=b=info", "x" * 5000],
)
def test_a_wrong_filter_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid log|longer"):
        LogFilter.parse(text)


@pytest.mark.parametrize(
    ("text", "target", "level"),
    [
        ("info", "proxy::inbound", Level.INFO),
        ("info,proxy=debug", "proxy::inbound", Level.DEBUG),
        ("info,proxy=debug", "proxying", Level.INFO),
        ("info,ztunnel::proxy=debug", "proxy::inbound", Level.DEBUG),
        ("proxy=debug,proxy::inbound=off", "proxy::inbound", Level.OFF),
        ("proxy=debug,proxy::inbound=off", "proxy::outbound", Level.DEBUG),
        ("error,ztunnel=trace", "xds", Level.TRACE),
        ("error,ztunnel=trace", "access", Level.ERROR),
        ("error,ztunnel=trace,xds=warn", "xds::client", Level.WARN),
        ("info,access=off", "access", Level.OFF),
        ("access=debug", "xds", Level.ERROR),
        ("", "xds", Level.ERROR),
    ],
)
def test_the_most_specific_directive_decides(text: str, target: str, level: Level) -> None:
    assert LogFilter.parse(text).level_for(target) == level


def test_merging_lets_the_new_directive_win() -> None:
    start = LogFilter.parse("access=off,info")
    assert str(start.merged(LogFilter.parse("warn,xds=trace"))) == "access=off,xds=trace,warn"
    assert str(start) == "access=off,info"


@given(st.dictionaries(targets, levels))
def test_a_filter_reads_what_it_shows(directives: dict[str, Level]) -> None:
    made = LogFilter(directives)
    assert LogFilter.parse(str(made)) == made


@given(st.text(max_size=FILTER_CHARS_MAX + 10))
def test_any_text_is_a_filter_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        LogFilter.parse(text)


@pytest.mark.parametrize(
    ("target", "full"),
    [("access", "access"), ("xds", "ztunnel::xds"), ("cni::agent", "cni::agent"),
     ("cni-plugin", "cni-plugin"),
     ("ztunnel", "ztunnel")],
)  # fmt: skip
def test_the_full_path_of_a_target(target: str, full: str) -> None:
    assert full_target(target) == full
