from __future__ import annotations

from hypothesis import given, strategies as st

from cni.redirect.messages import NESTED, attribute, batch, message, nested, text
from ztunnel.linux.netlink import attributes_in, messages_in


@given(st.lists(st.tuples(st.integers(1, 100), st.binary(max_size=30)), max_size=8))
def test_attributes_are_read_back(items: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in items)
    assert list(attributes_in(data)) == items
    ((kind, inner),) = attributes_in(nested(7, [data]))
    assert (kind, list(attributes_in(inner))) == (NESTED | 7, items)


def test_names_end_in_a_zero() -> None:
    assert list(attributes_in(text(1, "abc"))) == [(1, b"abc\0")]


def test_a_batch_numbers_its_messages_between_two_edges() -> None:
    steps = [("one", message(1, 2, [text(1, "x")])), ("two", message(2, 2, []))]
    made = batch(steps)
    read = list(messages_in(made.data))
    assert made.labels == ("one", "two")
    assert [kind for kind, *_ in read] == [0x10, 10 << 8 | 1, 10 << 8 | 2, 0x11]
    assert [sequence for _, _, sequence, _ in read] == [0, 1, 2, 0]
    assert read[1][3][0] == 2
