from __future__ import annotations

import subprocess
import sys

import pytest

from ztunnel.cli.main import main


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("proxy", "demo", "version"))


def test_the_proxys_help_names_the_settings_and_starts_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["proxy", "ztunnel", "--help"]) == 0
    assert "LOCAL_XDS_PATH" in capsys.readouterr().out


def test_an_unknown_command_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 1
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_version_prints_one_line_and_does_not_load_the_proxy() -> None:
    script = (
        "import sys; from ztunnel.cli.main import main; main(['version']);"
        "print(sorted({'trio', 'ssl', 'grpc', 'cryptography'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    version, loaded = ended.stdout.splitlines()
    assert version.startswith("ztunnel ")
    assert loaded == "[]"
