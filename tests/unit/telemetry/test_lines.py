from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, strategies as st

from ztunnel.model.network import Endpoint, HostPort, Port, parse_ip
from ztunnel.telemetry.lines import (
    Timestamps,
    bare,
    json_line,
    json_value,
    plain_line,
    plain_value,
)

TIME = "2026-01-02T03:04:05.000678Z"
hostile = st.text(max_size=60) | st.sampled_from(
    ["\n", "\r\n", "\x85", "\u2028", '"', "\\", "\ud800", "\x1b[31m", '" a="b', "\tinfo\t"]
)
fields = st.lists(st.tuples(st.sampled_from(["a", "b.c", "d"]), hostile), max_size=4)


def test_a_time_has_microseconds() -> None:
    shown = Timestamps()
    assert shown.show(1767323045_000678_999) == TIME
    assert shown.show(1767323045_999999_000) == "2026-01-02T03:04:05.999999Z"
    assert shown.show(1767323046_000000_000) == "2026-01-02T03:04:06.000000Z"


def test_a_plain_line() -> None:
    values = [("address", Endpoint.parse("192.0.2.1:80")), ("name", "a b"), ("n", 3), ("no", None)]
    line = plain_line(TIME, "info", "xds::client", "stream established", values)
    assert line == (
        f'{TIME}\tinfo\txds::client\tstream established\taddress=192.0.2.1:80 name="a b" n=3\n'
    )


def test_a_plain_line_without_fields_still_ends_in_a_tab() -> None:
    assert plain_line(TIME, "warn", "a", "b c", []) == f"{TIME}\twarn\ta\tb c\t\n"


def test_spans_stand_behind_the_target_outermost_first() -> None:
    spans = [("proxy", {"wl": "ns/pod"}), ("inbound", {"id": "ab", "peer": "x y"})]
    line = plain_line(TIME, "info", "proxy::inbound", "m", [], spans)
    assert line.split("\t")[2] == 'proxy::inbound:proxy{wl=ns/pod}:inbound{id=ab peer="x y"}'


def test_a_json_line() -> None:
    values = [("src.addr", Endpoint.parse("192.0.2.10:40112")), ("bytes_sent", 11), ("no", None)]
    line = json_line(TIME, "info", "xds", "m", values, [("proxy", {"wl": "ns/pod"})])
    assert line == (
        f'{{"level":"info","time":"{TIME}","scope":"ztunnel::xds","message":"m",'
        '"src.addr":"192.0.2.10:40112","bytes_sent":11,"proxy":{"wl":"ns/pod"}}\n'
    )


@pytest.mark.parametrize(
    ("value", "plain", "as_json"),
    [
        ("a", '"a"', '"a"'),
        (True, "true", "true"),
        (7, "7", "7"),
        (1.5, "1.5", "1.5"),
        (float("nan"), "nan", '"nan"'),
        (parse_ip("2001:db8::1"), "2001:db8::1", '"2001:db8::1"'),
        (Endpoint.parse("[::1]:5"), "[::1]:5", '"[::1]:5"'),
        (HostPort("h", Port(5)), "h:5", '"h:5"'),
        (HostPort("h a=b", Port(5)), '"h a=b:5"', '"h a=b:5"'),
        ([1, "a"], "\"[1, 'a']\"", '[1, "a"]'),
        (ValueError("x"), '"x"', '"x"'),
    ],
)
def test_how_a_value_is_shown(value: object, plain: str, as_json: str) -> None:
    assert (plain_value(value), json_value(value)) == (plain, as_json)


@given(hostile)
def test_a_bare_value_cannot_hold_a_separator(text: str) -> None:
    shown = bare(text)
    assert shown.startswith('"') or not set(shown) & set(' \t\n"={}\\')


@given(fields, hostile)
def test_a_hostile_value_stays_one_value_in_one_plain_line(
    values: list[tuple[str, str]], span: str
) -> None:
    line = plain_line(TIME, "info", "a", "m", values, [("s", {"x": span})])
    assert len(line.splitlines()) == 1
    assert line.count("\t") == 4
    quoted = r'[a-z.]+=("(?:[^"\\]|\\.)*")'
    shown = line.rstrip("\n").rpartition("\t")[2]
    assert re.fullmatch(rf"(?:{quoted}(?: |$))*", shown)
    assert [json.loads(value) for value in re.findall(quoted, shown)] == [v for _, v in values]


@given(fields, hostile, hostile)
def test_a_hostile_value_stays_one_value_in_one_json_line(
    values: list[tuple[str, str]], message: str, span: str
) -> None:
    line = json_line(TIME, "info", "a", message, values, [("s", {"x": span})])
    assert len(line.splitlines()) == 1
    parsed = json.loads(line)
    assert parsed["message"] == message
    assert parsed["s"] == {"x": span}
    assert {key: parsed[key] for key, _ in values} == dict(values)
