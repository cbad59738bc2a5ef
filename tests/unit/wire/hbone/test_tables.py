from __future__ import annotations

import tracemalloc

from hpack import Decoder, Encoder
from hypothesis import given, strategies as st

from ztunnel.wire.hbone.tables import IncomingTable, OutgoingTable

Fields = list[tuple[bytes, bytes]]

# Long enough that a few fill a table, few enough that some repeat.
field = st.tuples(
    st.sampled_from([b":status", b"baggage", b"x"]), st.sampled_from([b"200", b"a" * 900, b"b"])
)
steps = st.lists(st.tuples(st.integers(0, 1), st.lists(field, max_size=5)), max_size=20)


@given(steps=steps)
def test_connections_that_share_the_coders_do_not_share_tables(
    steps: list[tuple[int, Fields]],
) -> None:
    ours = OutgoingTable(), OutgoingTable()
    theirs = IncomingTable(), IncomingTable()
    encoders, decoders = (Encoder(), Encoder()), (Decoder(), Decoder())
    for which, fields in steps:
        block = ours[which].encode(fields)
        assert block == encoders[which].encode(fields, huffman=False)
        assert decoders[which].decode(block, raw=True) == fields
        assert theirs[which].decode(block, max_list_size=65_536) == fields


def test_only_the_smallest_and_the_last_size_are_told() -> None:
    table = OutgoingTable()
    for size in (1000, 50, 3000, 2000):
        table.resize(size)
    told = Encoder()
    for size in (50, 2000):
        told.header_table_size = size
    assert table.encode([]) == told.encode([])
    assert table.encode([]) == b""


def test_a_table_with_a_few_fields_takes_a_few_hundred_bytes() -> None:
    count = 100
    fields = [(b"baggage", b"x" * 10), (b"a", b"b")]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tables = [OutgoingTable() for _ in range(count)]
    for table in tables:
        table.encode(fields)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / count < 500
