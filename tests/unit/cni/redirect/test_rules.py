from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from cni.redirect.rules import (
    Accept,
    Action,
    Base,
    Chain,
    ChainType,
    Condition,
    HasAddress,
    HasLocalSocket,
    HasMark,
    HasPort,
    Hook,
    InNetwork,
    InSet,
    IsFirstSegment,
    IsProtocol,
    Jump,
    MarkConnection,
    OnInterface,
    Protocol,
    Redirect,
    RestoreMark,
    Return,
    RewriteSource,
    Rule,
    SetZone,
    Table,
    check_interface_name,
)

V4, V6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")


@pytest.mark.parametrize(
    ("noun", "text"),
    [
        (IsProtocol(Protocol.UDP), "meta l4proto udp"),
        (HasPort(Protocol.TCP, 53), "tcp dport 53"),
        (HasPort(Protocol.UDP, 53, source=True, negate=True), "udp sport != 53"),
        (HasAddress(V4), "ip daddr 192.0.2.1"),
        (HasAddress(V6, source=True, negate=True), "ip6 saddr != 2001:db8::1"),
        (HasMark(0x539), "meta mark & 0x00000fff == 0x00000539"),
        (HasMark(0x111, connection=True, negate=True), "ct mark & 0x00000fff != 0x00000111"),
        (OnInterface("eth0"), 'iifname "eth0"'),
        (OnInterface("lo", leaving=True, negate=True), 'oifname != "lo"'),
        (InNetwork(ip_network("192.0.2.0/24")), "ip daddr 192.0.2.0/24"),
        (InNetwork(ip_network("2001:db8::/32"), source=True), "ip6 saddr 2001:db8::/32"),
        (InSet(4, "pods"), "ip daddr @pods"),
        (InSet(6, "pods"), "ip6 daddr @pods"),
        (HasLocalSocket(), "meta skuid != 4294967295"),
        (HasLocalSocket(1000), "meta skuid 1000"),
        (RewriteSource(V4), "snat ip to 192.0.2.1"),
        (RewriteSource(V6), "snat ip6 to 2001:db8::1"),
        (IsFirstSegment(), "tcp flags & (fin | syn | rst | ack) == syn"),
        (Redirect(15001), "redirect to :15001"),
        (Accept(), "accept"),
        (Return(), "return"),
        (Jump("there"), "jump there"),
        (MarkConnection(0x111), "ct mark set ct mark & 0xfffff000 | 0x00000111"),
        (RestoreMark(), "meta mark set ct mark"),
        (SetZone(1), "ct zone set 1"),
    ],
)
def test_nouns_print_as_nft_writes_them(noun: Condition | Action, text: str) -> None:
    assert str(noun) == text


def test_a_rule_counts_what_it_acts_on_unless_it_only_jumps() -> None:
    assert str(Rule((IsProtocol(Protocol.TCP),), Accept())) == "meta l4proto tcp counter accept"
    assert str(Rule((), Jump("there"))) == "jump there"


def test_a_table_prints_as_a_file_for_nft() -> None:
    base = Base(ChainType.NAT, Hook.OUTPUT, -100)
    chains = (Chain("mine", (Rule((), Accept()),)), Chain("output", (), base))
    assert str(Table("t", chains)) == (
        "table inet t {\n"
        "\tchain mine {\n\t\tcounter accept\n\t}\n"
        "\tchain output {\n\t\ttype nat hook output priority -100; policy accept;\n\t}\n"
        "}\n"
    )


@pytest.mark.parametrize("name", ["eth0", "x", "a-very-long.if_", "vlan@1"])
def test_names_the_kernel_takes_are_taken(name: str) -> None:
    check_interface_name(name)


@pytest.mark.parametrize(
    "name", ["", "sixteen-letters0", "a b", "a/b", 'a"b', "a'b", "a\tb", "a\nb", "\0", "ä"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an interface name"):
        check_interface_name(name)
