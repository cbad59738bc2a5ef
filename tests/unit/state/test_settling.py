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


def test_large_slices_are_taken_out_of_sight_in_portions(frozen: list[int]) -> None:
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
        settling.came(15)
    assert frozen == []
