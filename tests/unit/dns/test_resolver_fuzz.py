"""Queries that were good once, with some of their bytes changed."""

from __future__ import annotations

import dns.message
from hypothesis import given, strategies as st

from tests.support.builders import a_service
from tests.support.dns_bench import CART, Bench, a_query
from ztunnel.dns.resolver import Pending, Transport
from ztunnel.wire import dns as dns_wire
from ztunnel.wire.dns import Rcode

OPCODE = 0x78  # dnspython reads other operations in ways of their own

FUZZED = Bench(CART, a_service("*.wild.example", vips=["10.0.0.4"]))
SEEDS = [
    a_query(),
    a_query("x.wild.example", "AAAA", use_edns=0, payload=700),
    a_query("1.0.0.10.in-addr.arpa", "PTR"),
    a_query("_80._tcp.cart.shop", "SRV", use_edns=1),
    a_query("example.org", "HTTPS", want_dnssec=True),
]


@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 90),
    rest=st.binary(max_size=20),
    by=st.sampled_from(list(Transport)),
)
def test_whatever_a_query_turns_into_is_answered_or_not(
    seed: bytes, changes: list[tuple[int, int]], end: int, rest: bytes, by: Transport
) -> None:
    data = bytearray(seed[:end] + rest)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    outcome = FUZZED.resolver.ask(bytes(data), by)
    if isinstance(outcome, Pending):
        outcome = FUZZED.resolver.refuse(outcome)
    if outcome is not None:
        assert outcome[:2] == data[:2]
        assert outcome[2] & 0x80
        if data[2] & OPCODE:
            assert dns_wire.rcode_of(outcome) == Rcode.NOTIMP
        else:
            dns.message.from_wire(outcome)
