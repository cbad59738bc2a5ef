from __future__ import annotations

import pytest

from ztunnel.cli.complaint import complain
from ztunnel.errors import ConfigError


def test_each_problem_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(ConfigError("one\ntwo")) == 1
    assert capsys.readouterr().err == "ztunnel: one\nztunnel: two\n"
