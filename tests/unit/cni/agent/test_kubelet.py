from __future__ import annotations

import os
from pathlib import Path

import pytest

from cni.agent.kubelet import kubelet_uid
from tests.support.kube import FakeProc


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


@pytest.mark.parametrize("name", ["kubelet", "k3s-server"])
def test_the_kubelet_is_known_by_its_name(proc: FakeProc, name: str) -> None:
    proc.add_raw("0::/", 0, name="other")
    folder = proc.add_raw("0::/", 0, name=name)
    if os.geteuid() == 0:
        os.chown(folder, 4321, 0)
    assert kubelet_uid(proc.root) == folder.stat().st_uid


def test_of_many_programs_in_one_it_is_the_one_told_to(proc: FakeProc) -> None:
    folder = proc.add_raw("0::/", 0, name="kubelite")
    assert kubelet_uid(proc.root) is None
    (folder / "cmdline").write_bytes(b"kubelite\0--kubelet-args-file=x\0")
    assert kubelet_uid(proc.root) == folder.stat().st_uid


def test_without_a_kubelet_there_is_no_answer(proc: FakeProc, tmp_path: Path) -> None:
    proc.add_raw("0::/", 0, name="other")
    (tmp_path / "77").mkdir()  # a process that ended while we looked
    assert kubelet_uid(proc.root) is None
    assert kubelet_uid(tmp_path / "missing") is None
