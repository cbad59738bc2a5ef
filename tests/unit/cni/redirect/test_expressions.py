from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from cni.redirect.expressions import expressions
from cni.redirect.rules import (
    Accept,
    Condition,
    HasAddress,
    HasLocalSocket,
    HasMark,
    HasPort,
    InNetwork,
    InSet,
    IsFirstSegment,
    IsForUs,
    Jump,
    MarkConnection,
    OnInterface,
    Protocol,
    Redirect,
    RewriteSource,
    Rule,
    SetZone,
)

NETWORK, TRANSPORT = 1, 2


def names(rule: Rule) -> list[str]:
    return [dict(item["attrs"])["NFTA_EXPR_NAME"] for item in expressions(rule)]


def fields(rule: Rule, name: str) -> list[dict[str, object]]:
    """Read the fields of each expression called `name`."""
    found = [dict(item["attrs"]) for item in expressions(rule)]
    return [
        dict(item["NFTA_EXPR_DATA"]["attrs"]) for item in found if item["NFTA_EXPR_NAME"] == name
    ]


def compared(condition: Condition) -> list[tuple[object, bytes]]:
    """Read (operator, value) of each comparison."""
    rule = Rule((condition,), Accept())
    return [
        (item["NFTA_CMP_OP"], dict(item["NFTA_CMP_DATA"]["attrs"])["NFTA_DATA_VALUE"])
        for item in fields(rule, "cmp")
    ]


def test_conditions_come_first_then_the_counter_then_the_action() -> None:
    rule = Rule((HasMark(1), OnInterface("lo")), Redirect(80))
    assert names(rule) == ["meta", "bitwise", "cmp", "meta", "cmp", "counter", "immediate", "redir"]


def test_a_jump_is_not_counted() -> None:
    assert names(Rule((), Jump("there"))) == ["immediate"]


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        pytest.param(HasPort(Protocol.TCP, 15008), [(0, b"\x06"), (0, b"\x3a\xa0")], id="port"),
        pytest.param(
            HasPort(Protocol.UDP, 53, negate=True), [(0, b"\x11"), (1, b"\x00\x35")], id="no port"
        ),
        pytest.param(
            HasAddress(ip_address("127.0.0.1"), negate=True),
            [(0, b"\x02"), (1, b"\x7f\x00\x00\x01")],
            id="no ipv4 address",
        ),
        pytest.param(
            HasAddress(ip_address("::1")), [(0, b"\x0a"), (0, bytes(15) + b"\x01")], id="ipv6"
        ),
        pytest.param(
            InNetwork(ip_network("10.0.0.0/8")), [(0, b"\x02"), (0, b"\x0a\0\0\0")], id="network"
        ),
        pytest.param(InSet(6, "pods"), [(0, b"\x0a")], id="set"),
        pytest.param(HasLocalSocket(1), [(0, b"\x01\0\0\0")], id="owner"),
        pytest.param(HasLocalSocket(), [(1, b"\xff" * 4)], id="any owner"),
        pytest.param(OnInterface("lo"), [(0, b"lo".ljust(16, b"\0"))], id="interface"),
        pytest.param(IsFirstSegment(), [(0, b"\x02")], id="first segment"),
        pytest.param(IsForUs(), [(0, b"\x02\0\0\0")], id="for us"),
    ],
)
def test_negation_is_for_the_value_never_for_the_family_or_transport(
    condition: Condition, wanted: list[tuple[object, bytes]]
) -> None:
    assert compared(condition) == wanted


@pytest.mark.parametrize(
    ("condition", "where"),
    [
        (HasPort(Protocol.TCP, 1), (TRANSPORT, 2, 2)),
        (HasPort(Protocol.TCP, 1, source=True), (TRANSPORT, 0, 2)),
        (HasAddress(ip_address("192.0.2.1")), (NETWORK, 16, 4)),
        (HasAddress(ip_address("192.0.2.1"), source=True), (NETWORK, 12, 4)),
        (HasAddress(ip_address("2001:db8::1")), (NETWORK, 24, 16)),
        (HasAddress(ip_address("2001:db8::1"), source=True), (NETWORK, 8, 16)),
        (InNetwork(ip_network("10.0.0.0/8"), source=True), (NETWORK, 12, 4)),
        (InSet(6, "pods"), (NETWORK, 24, 16)),
        (IsFirstSegment(), (TRANSPORT, 13, 1)),
    ],
)
def test_headers_are_read_at_the_right_place(
    condition: Condition, where: tuple[int, int, int]
) -> None:
    [payload] = fields(Rule((condition,), Accept()), "payload")
    keys = ("NFTA_PAYLOAD_BASE", "NFTA_PAYLOAD_OFFSET", "NFTA_PAYLOAD_LEN")
    assert tuple(payload[key] for key in keys) == where


def test_marking_a_connection_keeps_the_bits_of_others() -> None:
    [bitwise] = fields(Rule((), MarkConnection(0x111)), "bitwise")
    mask = dict(bitwise["NFTA_BITWISE_MASK"]["attrs"])["NFTA_DATA_VALUE"]
    flip = dict(bitwise["NFTA_BITWISE_XOR"]["attrs"])["NFTA_DATA_VALUE"]

    def marked(before: int) -> int:
        return before & int.from_bytes(mask, "little") ^ int.from_bytes(flip, "little")

    assert [hex(marked(before)) for before in (0, 0xFFFFFFFF, 0xABCD0539)] == [
        "0x111",
        "0xfffff111",
        "0xabcd0111",
    ]


def test_a_zone_is_a_short() -> None:
    [immediate] = fields(Rule((), SetZone(1)), "immediate")
    assert immediate["NFTA_IMMEDIATE_DATA"] == {"attrs": [("NFTA_DATA_VALUE", b"\x01\x00")]}


def test_a_network_is_compared_by_its_prefix_alone() -> None:
    rule = Rule((InNetwork(ip_network("10.0.0.0/9")),), Accept())
    [bitwise] = fields(rule, "bitwise")
    assert bitwise["NFTA_BITWISE_MASK"] == {"attrs": [("NFTA_DATA_VALUE", b"\xff\x80\0\0")]}


def test_a_new_source_is_of_its_own_family() -> None:
    rule = Rule((), RewriteSource(ip_address("192.0.2.1")))
    [nat] = fields(rule, "nat")
    assert (nat["NFTA_NAT_TYPE"], nat["NFTA_NAT_FAMILY"]) == (0, 2)
    [nat] = fields(Rule((), RewriteSource(ip_address("2001:db8::1"))), "nat")
    assert nat["NFTA_NAT_FAMILY"] == 10
