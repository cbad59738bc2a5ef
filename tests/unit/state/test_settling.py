from __future__ import annotations

import gc

import pytest

from ztunnel.state import settling as module
from ztunnel.state.settling import Settling


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(1))
    monkeypatch.setattr(module, "FREEZE_RESOURCES", 100)
    return calls


def test_large_changes_are_taken_out_of_sight_in_portions(frozen: list[int]) -> None:
    settling = Settling()
    settling.came(99)
    assert frozen == []
    settling.came(16)
    assert frozen == [1]
    settling.came(99)
    assert frozen == [1]


def test_everyday_changes_stay_in_sight(frozen: list[int]) -> None:
    settling = Settling()
    for _ in range(100):
        for part in (8, 7):
            settling.came(part)
        settling.ended()
    assert frozen == []


def test_a_large_change_counts_as_a_whole_in_whatever_parts_it_comes(frozen: list[int]) -> None:
    settling = Settling()
    for _ in range(24):
        settling.came(4)
    assert frozen == []
    settling.came(4)
    assert frozen == [1]
