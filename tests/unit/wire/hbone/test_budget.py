from __future__ import annotations

import pytest
from h2.errors import ErrorCodes

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.budget import Budget


def test_spending_more_than_there_is_says_on_what():
    budget = Budget(2, per_read=1)
    budget.spend("PING")
    budget.spend("PING")
    with pytest.raises(TunnelError, match="too many PING") as caught:
        budget.spend("PING")
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_dear_frame_costs_more():
    budget = Budget(10, per_read=0)
    budget.spend("SETTINGS", cost=10)
    with pytest.raises(TunnelError):
        budget.spend("PING")


def test_one_frame_per_read_can_go_on_for_ever():
    budget = Budget(3, per_read=1)
    for _ in range(100):
        budget.refill()
        budget.spend("PING")


def test_idle_reads_do_not_save_up_beyond_the_brim():
    budget = Budget(2, per_read=5)
    budget.left += 1000
    budget.refill()
    assert budget.left == 2
