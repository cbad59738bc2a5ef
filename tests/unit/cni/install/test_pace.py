from __future__ import annotations

from cni.install.pace import QUICK_REPAIRS_MAX, QUICK_SECONDS, WAIT_SECONDS, RepairPace, suspect


def test_a_single_repair_is_made_at_once() -> None:
    pace = RepairPace()
    assert pace.repaired(0.0) == 0.0
    assert pace.repaired(QUICK_SECONDS) == 0.0
    assert not pace.is_fight


def test_repairs_in_a_row_are_slowed_down_and_become_a_fight() -> None:
    pace = RepairPace()
    pace.repaired(0.0)
    for number in range(1, QUICK_REPAIRS_MAX + 2):
        assert not pace.is_fight
        assert pace.repaired(float(number)) == WAIT_SECONDS
    assert pace.is_fight


def test_a_fight_ends_with_a_quiet_time() -> None:
    pace = RepairPace()
    for number in range(20):
        pace.repaired(float(number))
    assert pace.is_fight
    assert pace.repaired(100.0) == 0.0
    assert not pace.is_fight


def test_cilium_is_suspected_where_it_is() -> None:
    assert "cni.exclusive" in suspect(["05-cilium.conflist"])
    assert "cni.exclusive" not in suspect(["10-calico.conflist"])
