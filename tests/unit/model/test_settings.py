from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from ztunnel.model.settings import (
    ProxyMode,
    ServerUrl,
    Source,
    SourceKind,
    WorkloadInfo,
    boolean,
    drain_seconds,
    duration,
    fake_ca,
    header,
    integer,
    optional,
    root_source,
    seconds,
    server_url,
    shown,
    trust_domains,
    worker_count,
    workers,
    workload_info,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10s", 10),
        ("5m", 300),
        ("1h30m", 5400),
        ("100ms", 0.1),
        ("90", 90),
        ("1.5", 1.5),
        ("1d", 86400),
        ("1w", 604800),
        ("250us", 0.00025),
        ("250µs", 0.00025),
        ("1m1s1ms", 61.001),
    ],
)
def test_a_duration(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0s", "-1s", "1x", "s", "1 s", "1s ", "1s2", "inf", "nan", "99999999999", "1e3"],
)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r".+; .+"):
        seconds(text)


@given(st.text(max_size=20))
def test_any_text_is_a_positive_duration_or_refused(text: str) -> None:
    try:
        value = seconds(text)
    except ValueError:
        return
    assert value > 0


@pytest.mark.parametrize("text", ["", "True", "TRUE", "1", "yes", " true"])
def test_only_true_and_false_are_booleans(text: str) -> None:
    assert (boolean("true"), boolean("false")) == (True, False)
    with pytest.raises(ValueError, match="boolean"):
        boolean(text)


@pytest.mark.parametrize("text", ["", "-1", "1", "11", "1.0", "٣", "9" * 30])
def test_a_number_outside_its_range_is_refused(text: str) -> None:
    assert integer(2, 10)("10") == 10
    with pytest.raises(ValueError, match="; "):
        integer(2, 10)(text)


def test_empty_means_absent_where_it_may() -> None:
    assert optional(integer(1))("") is None
    assert optional(integer(1))("3") == 3


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"),
        ("https://a:1/", "https://a:1"),
        ("a", "https://a:443"),
        ("[2001:db8::1]:5", "https://[2001:db8::1]:5"),
    ],
)
def test_a_server_needs_no_scheme(text: str, url: str) -> None:
    assert str(server_url(text)) == url


@pytest.mark.parametrize("text", ["", "http://a:1", "https://", "a:b", "a:99999", "a/b", "u:p@a:1"])
def test_not_a_server(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        server_url(text)


@pytest.mark.parametrize("text", ["a/b", "a/b/c/d", "/b/c", "a//c", ""])
def test_a_workload_has_three_names(text: str) -> None:
    assert workload_info("a/b/c") == WorkloadInfo("a", "b", "c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="three parts"):
        workload_info(text)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("", 1), ("1", 1), ("5", 5), ("0", 8), ("50%", 4), ("1%", 1), ("13%", 2), ("100%", 8)],
)
def test_how_many_workers_on_eight_cores(wanted: str, count: int) -> None:
    assert worker_count(workers(wanted), 8) == count


@pytest.mark.parametrize(
    ("grace", "deadline"), [(None, 5), (30, 25), (11, 6), (10, 9), (2, 1), (1, 1), (0, 1)]
)
def test_the_drain_ends_before_the_pod_is_killed(grace: int | None, deadline: float) -> None:
    assert drain_seconds(grace) == deadline


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("", False), ("/ca.pem", Path("/ca.pem"))],
)
def test_a_fake_ca_is_on_off_or_a_file(text: str, value: Path | bool) -> None:
    assert fake_ca(text) == value


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("SYSTEM", Source(SourceKind.SYSTEM, "SYSTEM")),
        ("./root.pem", Source(SourceKind.FILE, "./root.pem")),
        ("-----BEGIN X-----", Source(SourceKind.LITERAL, "-----BEGIN X-----")),
    ],
)
def test_where_a_root_is(text: str, source: Source) -> None:
    assert root_source(text) == source


@pytest.mark.parametrize(("name", "value"), [("a b", "c"), ("", "c"), ("a", "c\n"), ("a", "ü")])
def test_a_header_grpc_would_refuse(name: str, value: str) -> None:
    assert header("X-Ok", "v") == ("x-ok", "v")
    with pytest.raises(ValueError, match="gRPC header"):
        header(name, value)


@pytest.mark.parametrize(
    ("name", "value", "as_json"),
    [
        ("ttl_seconds", 1.25, {"secs": 1, "nanos": 250_000_000}),
        ("mode", ProxyMode.DEDICATED, "Dedicated"),
        ("info", WorkloadInfo("a", "b", "c"), "a/b/c"),  # type: ignore[arg-type]
        ("xds", ServerUrl("a", 1), "https://a:1"),
        ("root", Source(SourceKind.FILE, "/x"), "/x"),
        ("token", Source(SourceKind.LITERAL, "s3cret"), "<literal>"),
        ("path", Path("/x"), "/x"),
        ("xds_headers", (("a", "s3cret"),), [["a", "<redacted>"]]),
        ("names", (1, 2), ["1", "2"]),
        ("map", {"a": "b"}, {"a": "b"}),
        ("count", 3, 3),
        ("nothing", None, None),
    ],
)
def test_a_setting_as_json(name: str, value: object, as_json: object) -> None:
    assert shown(name, value) == as_json


def test_a_duration_rounds_to_whole_seconds_when_it_must() -> None:
    assert duration(0.9999999999) == {"secs": 1, "nanos": 0}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("old.example", ("old.example",)),
        (" a.example, B_1 ,,c-2 ", ("a.example", "B_1", "c-2")),
    ],
)
def test_trust_domains_are_a_comma_list(text: str, names: tuple[str, ...]) -> None:
    assert trust_domains(text) == names


@pytest.mark.parametrize("text", ["a/b", "spiffe://a", "a b", "a,b:c", "*"])
def test_not_a_trust_domain(text: str) -> None:
    with pytest.raises(ValueError, match="not trust domains; write"):
        trust_domains(text)
