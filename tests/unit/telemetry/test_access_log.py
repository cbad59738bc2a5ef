from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import DeniedError, DrainError, RouteError
from ztunnel.model.identity import Identity, Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Endpoint, HostPort, Port
from ztunnel.telemetry.access_log import FIELDS, AccessLog, Direction, Ends, Record
from ztunnel.telemetry.log import Pipeline
from ztunnel.telemetry.writer import LineWriter

TIME = "2026-01-02T03:04:05.000678Z"
CLIENT = Endpoint.parse("192.0.2.10:40112")
PLAIN_EXAMPLE = (
    f"{TIME}\tinfo\taccess\tconnection complete\t"
    'src.addr=192.0.2.10:40112 src.workload="web-0" src.namespace="shop" '
    'src.identity="spiffe://cluster.local/ns/shop/sa/web" src.cluster="lab" '
    "dst.addr=192.0.2.20:15008 dst.hbone_addr=192.0.2.20:8080 "
    'dst.service="cart.shop.svc.cluster.local" dst.workload="cart-0" dst.namespace="shop" '
    'dst.identity="spiffe://cluster.local/ns/shop/sa/cart" dst.cluster="lab" '
    'direction="outbound" bytes_sent=11 bytes_recv=22 duration="3ms"\n'
)
hostile = st.text(max_size=40) | st.sampled_from(
    ["\n", "\x85", "\u2028", '"', "\\", "\ud800", 'x" error="forged', "a b", "x" * 5000]
)


class Memory(LineWriter):
    """Keeps lines instead of writing them."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def an_identity(account: str) -> Identity:
    return Identity(TrustDomain("cluster.local"), Namespace("shop"), ServiceAccount(account))


def a_log(wanted: str = "info", *, json: bool = False) -> tuple[AccessLog, list[str]]:
    writer = Memory()
    pipeline = Pipeline(writer=writer, clock_ns=lambda: 1767323045_000678_000)
    pipeline.set_up(wanted, json=json)
    return AccessLog(pipeline), writer.lines


def a_record(log: AccessLog, **known: Any) -> Record:
    given_: dict[str, Any] = {
        "log": log,
        "direction": Direction.OUTBOUND,
        "source": CLIENT,
        "started": 100.0,
    }
    return Record(**(given_ | known))


def the_ends() -> Ends:
    return Ends(
        destination=Endpoint.parse("192.0.2.20:15008"),
        hbone_target=Endpoint.parse("192.0.2.20:8080"),
        source_workload="web-0",
        source_namespace="shop",
        source_identity=an_identity("web"),
        source_cluster="lab",
        destination_service="cart.shop.svc.cluster.local",
        destination_workload="cart-0",
        destination_namespace="shop",
        destination_identity=an_identity("cart"),
        destination_cluster="lab",
    )


def the_example(log: AccessLog, direction: Direction = Direction.OUTBOUND) -> Record:
    return a_record(log, direction=direction, bytes_from_client=11, bytes_from_server=22)


def test_the_plain_example_byte_for_byte() -> None:
    log, lines = a_log()
    record = the_example(log)
    record.opened(the_ends())
    record.finish(100.0039)
    assert lines == [PLAIN_EXAMPLE]


def test_the_json_example_byte_for_byte() -> None:
    log, lines = a_log(json=True)
    record = a_record(log, bytes_from_client=11, bytes_from_server=22)
    record.opened(Ends(source_workload="web-0"))
    record.finish(100.003)
    expected = (
        f'{{"level":"info","time":"{TIME}","scope":"access","message":"connection complete",'
        '"src.addr":"192.0.2.10:40112","src.workload":"web-0","direction":"outbound",'
        '"bytes_sent":11,"bytes_recv":22,"duration":"3ms"}\n'
    )
    assert lines == [expected]


@pytest.mark.parametrize(
    ("direction", "shown"),
    [
        (Direction.OUTBOUND, "bytes_sent=11 bytes_recv=22"),
        (Direction.INBOUND, "bytes_sent=22 bytes_recv=11"),
    ],
)
def test_bytes_are_seen_from_the_application_on_this_side(direction: Direction, shown: str) -> None:
    log, lines = a_log()
    record = the_example(log, direction)
    record.opened(the_ends())
    record.finish(101)
    assert shown in lines[0]
    assert f'direction="{direction}"' in lines[0]


def test_all_fields_come_in_the_order_of_the_reference() -> None:
    log, lines = a_log(json=True)
    record = the_example(log)
    record.opened(the_ends())
    record.policy = "shop/deny-all"
    record.finish(101, DeniedError("no"))
    shown = json.loads(lines[0])
    assert tuple(shown)[4:] == FIELDS
    assert (shown["level"], shown["reason"], shown["policy"]) == (
        "error",
        "denied",
        "shop/deny-all",
    )


def test_an_opened_line_is_for_debugging() -> None:
    log, lines = a_log("access=debug")
    record = the_example(log)
    record.opened(the_ends())
    (line,) = lines
    assert line.startswith(f"{TIME}\tdebug\taccess\tconnection opened\tsrc.addr=")
    assert line.endswith('direction="outbound"\n')


def test_a_refusal_before_context_is_a_short_warning() -> None:
    log, lines = a_log()
    record = a_record(log, destination=Endpoint.parse("[2001:db8::1]:80"))
    record.finish(101, RouteError("unknown waypoint: x"))
    expected = (
        f"{TIME}\twarn\taccess\tconnection failed\tsrc.addr=192.0.2.10:40112 "
        'dst.addr=[2001:db8::1]:80 direction="outbound" error="unknown waypoint: x" '
        'reason="no_route"\n'
    )
    assert lines == [expected]


@pytest.mark.parametrize(
    ("error", "text", "reason"),
    [
        (DrainError("connection closed due to connection drain"), None, "drain"),
        (KeyError("x"), "'x'", "internal"),
        (TimeoutError(), "TimeoutError", "internal"),
        (ExceptionGroup("", [ExceptionGroup("", [DeniedError("no")])]), "no", "denied"),
    ],
)
def test_whose_fault_it_was(error: Exception, text: str | None, reason: str) -> None:
    log, lines = a_log(json=True)
    record = the_example(log)
    record.opened(the_ends())
    record.finish(101, error)
    shown = json.loads(lines[0])
    assert (shown["error"], shown["reason"]) == (text or str(error), reason)


def test_a_record_ends_once() -> None:
    log, _ = a_log()
    record = the_example(log)
    record.finish(101)
    with pytest.raises(AssertionError):
        record.finish(102)
    with pytest.raises(AssertionError):
        record.opened(the_ends())


@pytest.mark.parametrize(
    ("wanted", "error", "lines"),
    [
        ("access=off", None, 0),
        ("access=warn", None, 0),
        ("access=warn", DeniedError("no"), 1),
        ("access=off", DeniedError("no"), 0),
    ],
)
def test_the_level_of_the_target_decides(wanted: str, error: Exception | None, lines: int) -> None:
    log, written = a_log(wanted)
    record = the_example(log)
    record.opened(the_ends())
    record.finish(101, error)
    assert len(written) == lines


@given(
    st.tuples(hostile, hostile, hostile, hostile),
    st.booleans(),
    st.integers(0, 65535).map(Port),
)
def test_a_peer_cannot_forge_a_line_or_a_field(
    texts: tuple[str, str, str, str],
    as_json: bool,
    port: Port,
) -> None:
    log, lines = a_log(json=as_json)
    workload, service, authority, error = texts
    record = a_record(log)
    target = HostPort(authority, port)
    record.opened(Ends(source_workload=workload, destination_service=service, hbone_target=target))
    record.finish(101, DeniedError(error))
    (line,) = lines
    assert len(line.splitlines()) == 1
    if as_json:
        shown = json.loads(line)
        assert set(shown) <= {"level", "time", "scope", "message", *FIELDS}
    else:
        assert line.count("\t") == 4
        value = r'("(?:[^"\\]|\\.)*"|[^ "=\\]+)'
        tail = line.rstrip("\n").rpartition("\t")[2]
        assert re.fullmatch(rf"(?:[a-z._]+={value}(?: |$))+", tail)
        names = [pair[0] for pair in re.findall(rf"([a-z._]+)={value}(?: |$)", tail)]
        assert len(names) == len(set(names))
        assert set(names) <= set(FIELDS)
    assert len(line) < 20_000


def test_what_is_shared_is_printed_once_in_each_format() -> None:
    ends = the_ends()
    for as_json in (False, True, False):
        log, lines = a_log(json=as_json)
        for port in ("1", "2"):
            record = a_record(log, source=Endpoint.parse(f"192.0.2.10:{port}"))
            record.opened(ends)
            record.finish(101)
        first, second = lines
        assert first.replace("192.0.2.10:1", "192.0.2.10:2") == second
        assert first.startswith("{") is as_json
        assert ends.text(log.keys) is ends.text(log.keys)


def test_an_end_in_good_order_before_the_ends_are_known_names_what_was_meant() -> None:
    log, lines = a_log(json=True)
    record = a_record(log, destination=Endpoint.parse("192.0.2.20:80"))
    record.finish(101)
    shown = json.loads(lines[0])
    assert (shown["src.addr"], shown["dst.addr"]) == (str(CLIENT), "192.0.2.20:80")
    assert "dst.workload" not in shown
