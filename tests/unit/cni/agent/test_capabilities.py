from __future__ import annotations

from pathlib import Path

import pytest

from cni.agent.capabilities import NEEDED, held_capabilities, require_capabilities
from ztunnel.errors import PrivilegeError

ALL = (1 << 41) - 1


def test_our_own_can_be_read() -> None:
    assert 0 <= held_capabilities() <= ALL


def test_with_all_of_them_it_starts() -> None:
    require_capabilities(ALL)
    require_capabilities(sum(1 << number for number in NEEDED))


@pytest.mark.parametrize("number", NEEDED)
def test_the_one_that_is_missing_is_named_and_no_other(number: int) -> None:
    with pytest.raises(PrivilegeError) as caught:
        require_capabilities(ALL & ~(1 << number))
    assert [text for text in NEEDED.values() if text in str(caught.value)] == [NEEDED[number]]


def test_all_that_are_missing_are_named() -> None:
    with pytest.raises(PrivilegeError) as caught:
        require_capabilities(0)
    assert all(text in str(caught.value) for text in NEEDED.values())


@pytest.mark.parametrize("text", ["", "CapEff:", "CapEff:\txyz\n"])
def test_a_kernel_that_does_not_say_stops_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "status").write_text(text)
    with pytest.raises(PrivilegeError, match="cannot read our capabilities"):
        held_capabilities(tmp_path / "status")
