from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.transport.buffers import (
    HEADER_BYTES,
    SEND,
    UNIT_FIRST,
    UNIT_MOST,
    areas,
    grown,
)

FRAME_LIMITS = st.integers(16_384, 16_777_215)  # RFC 9113 s6.5.2


@pytest.mark.parametrize(
    ("unit", "size", "following"),
    [
        pytest.param(UNIT_FIRST, UNIT_FIRST, 4 * UNIT_FIRST, id="a full read: more at once"),
        pytest.param(UNIT_MOST, UNIT_MOST, UNIT_MOST, id="but never more than the most"),
        pytest.param(UNIT_MOST // 2, UNIT_MOST // 2, UNIT_MOST, id="also not by a step"),
        pytest.param(UNIT_MOST, UNIT_MOST // 2, UNIT_MOST, id="half full: stay"),
        pytest.param(UNIT_MOST, 100, UNIT_FIRST, id="hardly anything: start over"),
    ],
)
def test_how_much_to_read_next(unit: int, size: int, following: int) -> None:
    assert grown(unit, size) == following


@given(frame=FRAME_LIMITS, size=st.integers(1, UNIT_MOST))
def test_the_areas_hold_exactly_what_is_to_be_read(frame: int, size: int) -> None:
    views = areas(frame, size)
    assert sum(map(len, views)) == size
    assert all(len(view) == frame for view in views[:-1])


@given(frame=FRAME_LIMITS)
def test_there_is_room_for_a_header_before_each_area(frame: int) -> None:
    SEND[:] = bytes(len(SEND))
    for view in areas(frame, UNIT_MOST):
        view[:] = b"x" * len(view)
    position = 0
    while position < UNIT_MOST:
        assert SEND[position : position + HEADER_BYTES] == bytes(HEADER_BYTES)
        position = bytes(SEND).find(b"\0", position + HEADER_BYTES)
    assert bytes(SEND).count(b"x") == UNIT_MOST
