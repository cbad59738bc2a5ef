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


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["proxy", "ztunnel", "--foo"], "--foo"),
        (["proxy", "-v"], "-v"),
        (["proxy", "ztunnel", "another", "third"], "another third"),
        (["version", "x"], "x"),
        (["--version", "--short"], "--short"),
    ],
)
def test_words_a_command_does_not_know_are_refused_with_its_usage(
    words: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"unknown words: {unknown}\n" in err
    assert "usage: ztunnel" in err


def test_the_name_that_the_references_chart_passes_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROXY_MODE", "neither")  # the start goes no further than this
    for words in (["proxy", "ztunnel"], ["proxy"], []):
        assert main(words) == 1
        assert "invalid env var PROXY_MODE=neither" in capsys.readouterr().err


def test_help_of_a_command_is_no_unknown_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ztunnel [COMMAND]")
