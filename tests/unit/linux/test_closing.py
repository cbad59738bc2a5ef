from __future__ import annotations

import pytest

from ztunnel.linux.closing import Closing


class Door(Closing):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_end_of_the_block_closes_it() -> None:
    with Door() as door:
        assert not door.closed
    assert door.closed == 1


def test_so_does_an_error_which_goes_on() -> None:
    door = Door()
    with pytest.raises(LookupError, match="lost"), door:
        raise LookupError("lost")
    assert door.closed == 1
