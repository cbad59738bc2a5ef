from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from cni.redirect.legacy import FAMILIES, Block, open_filters, parse_entries
from tests.support.namespaces import needs_root, output_of
from ztunnel.devmesh.cluster import Cluster, Node

V4 = FAMILIES[0]
HEAD = 112  # of an entry of IPv4, before its target


def entry(target: bytes, data: bytes) -> bytes:
    size = HEAD + 32 + len(data)
    head = bytearray(HEAD)
    struct.pack_into("=HH", head, V4.target_offset_at, HEAD, size)
    return bytes(head) + struct.pack("=H29sB", 32 + len(data), target, 0) + data


def verdict(number: int) -> bytes:
    return entry(b"", struct.pack("=i4x", number))


def chain(name: bytes) -> bytes:
    return entry(b"ERROR", name.ljust(32, b"\0"))


RULE, HEADER = len(verdict(0)), len(chain(b""))
POLICY, RETURN = -2, -5

# One hook with a jump to each chain and a policy; a chain of ours and one of somebody else.
OTHER_AT = 3 * RULE
OURS_AT = OTHER_AT + HEADER + 2 * RULE
BLOCK = b"".join(
    [
        verdict(OURS_AT + HEADER),
        verdict(OTHER_AT + HEADER),
        verdict(POLICY),
        chain(b"OTHER"),
        verdict(OTHER_AT + HEADER + RULE),  # falls through to the next rule
        verdict(RETURN),
        chain(b"ISTIO_OUTPUT"),
        verdict(RETURN),
        chain(b"ERROR"),
    ]
)


def a_block() -> Block:
    return Block(1, (0, 0, 0, 0, 0), (2 * RULE, 0, 0, 0, 0), parse_entries(BLOCK, V4))


def shape(block: Block) -> list[object]:
    return [item.chain or item.jump for item in block.entries]


def test_chains_and_jumps_are_read() -> None:
    block = a_block()
    assert block.chains() == [b"ISTIO_OUTPUT"]
    assert shape(block) == [
        OURS_AT + HEADER,
        OTHER_AT + HEADER,
        None,
        b"OTHER",
        OTHER_AT + HEADER + RULE,
        None,
        b"ISTIO_OUTPUT",
        None,
        b"ERROR",
    ]


def test_the_references_part_is_cut_out_and_every_offset_moved() -> None:
    left = a_block().without_reference()
    at = OTHER_AT - RULE
    assert shape(left) == [at + HEADER, None, b"OTHER", at + HEADER + RULE, None, b"ERROR"]
    assert (left.hook_entry[0], left.underflow[0]) == (0, RULE)
    assert left.chains() == []
    # It reads as it says: the offsets of the entries are those of their bytes.
    data = b"".join(bytes(item.data) for item in left.entries)
    assert [item.at for item in parse_entries(data, V4)] == [item.at for item in left.entries]


def test_without_anything_of_the_reference_nothing_changes() -> None:
    once = a_block().without_reference()
    assert once.without_reference() == once


def test_what_was_read_is_not_changed() -> None:
    block = a_block()
    before = [bytes(item.data) for item in block.entries]
    block.without_reference()
    assert [bytes(item.data) for item in block.entries] == before


@given(st.binary(max_size=400))
def test_malformed_entries_raise_only_the_declared_errors(data: bytes) -> None:
    try:
        entries = parse_entries(data, V4)
    except (ValueError, struct.error):
        return
    for item in entries:
        assert item.chain is None or item.target == b"ERROR"


@pytest.fixture
def node() -> Iterator[Node]:
    with Cluster() as cluster:
        yield cluster.add_node("node")


@pytest.mark.netns
@needs_root
@pytest.mark.skipif(shutil.which("iptables-legacy") is None, reason="needs iptables")
def test_only_tables_that_exist_are_looked_at_and_rules_of_others_stay(node: Node) -> None:
    assert node.netns.call(open_filters) == []
    for words in (
        ("-N", "ISTIO_OUTPUT"),
        ("-A", "OUTPUT", "-j", "ISTIO_OUTPUT"),
        ("-A", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"),
        ("-N", "OTHER"),
        ("-A", "OTHER", "-j", "RETURN"),
        ("-A", "OUTPUT", "-p", "udp", "-j", "OTHER"),
    ):
        output_of(node, "iptables-legacy", "-t", "nat", *words)
    (old,) = node.netns.call(open_filters)
    try:
        assert old.find() == ["IPv4 iptables chain nat ISTIO_OUTPUT is left over"]
        old.remove()
        old.remove()
        assert old.find() == []
    finally:
        old.close()
    saved = output_of(node, "iptables-legacy-save", "-t", "nat")
    rules = [line for line in saved.splitlines() if "-A" in line]
    assert rules == [
        "-A OUTPUT -p tcp -j ACCEPT",
        "-A OUTPUT -p udp -j OTHER",
        "-A OTHER -j RETURN",
    ]
    assert output_of(node, "cat", "/proc/net/ip_tables_names") == "nat\n"
