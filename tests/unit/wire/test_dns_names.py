from __future__ import annotations

import dns.exception
import dns.name
import dns.wire
import pytest
from hypothesis import example, given, strategies as st

from ztunnel.wire import dns_names
from ztunnel.wire.dns_names import read_name

PLAIN = st.text("abcXYZ019-_", min_size=1, max_size=63)


def wire(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def by_dnspython(data: bytes, at: int) -> tuple[str, int] | None:
    """Read it the long way; None if it is no name."""
    try:
        parser = dns.wire.Parser(data, at)
        name = dns.name.from_wire_parser(parser, decompress=False)
    except (dns.exception.DNSException, ValueError):
        return None
    return name.to_text(omit_final_dot=True).lower(), parser.current


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (wire(b"cart", b"shop"), "cart.shop"),
        (wire(b"CART"), "cart"),
        (wire(b"_http", b"_tcp", b"a-1"), "_http._tcp.a-1"),
        (wire(), "."),
        (wire(b"*", b"shop"), "*.shop"),
        (wire(b"a.b", b"c"), r"a\.b.c"),
        (wire(b"\0\xff"), r"\000\255"),
        (wire(b"a b"), r"a\032b"),
        (wire(*[b"x" * 61] * 4, b"y" * 5), ".".join(["x" * 61] * 4 + ["y" * 5])),
    ],
)
def test_names_are_shown_escaped_and_in_lower_case(data: bytes, name: str) -> None:
    assert read_name(b"before" + data + b"after", 6) == (name, 6 + len(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\4car",
        b"\4cart",
        b"\x40" + b"x" * 64 + b"\0",
        b"\xc0\0",
        wire(*[b"x" * 61] * 4, b"y" * 7),
    ],
)
def test_what_is_no_name_is_refused(data: bytes) -> None:
    with pytest.raises((dns.exception.DNSException, ValueError)):
        read_name(data, 0)


@given(labels=st.lists(PLAIN, min_size=1, max_size=6), rest=st.binary(max_size=4))
def test_plain_names_are_read_the_short_way_as_the_long_way(labels: list[str], rest: bytes) -> None:
    data = wire(*(label.encode() for label in labels)) + rest
    assert dns_names._read_plain(data, 0) == by_dnspython(data, 0)


@given(data=st.binary(max_size=80), at=st.integers(0, 12))
@example(data=b"\3www\0", at=5)
@example(data=b"\3www\0", at=0)
def test_whatever_the_bytes_both_ways_agree(data: bytes, at: int) -> None:
    try:
        found = read_name(data, at)
    except (dns.exception.DNSException, ValueError):
        found = None
    assert found == by_dnspython(data, at)
