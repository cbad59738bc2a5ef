from __future__ import annotations

import pytest

from cni.agent.flags import RunFlags
from cni.agent.scopes import SCOPES
from ztunnel.errors import ConfigError
from ztunnel.telemetry.filter import Level


def test_without_flags_all_is_as_in_the_reference() -> None:
    flags = RunFlags.parse([])
    assert (flags.controlz_host, flags.controlz_port) == ("127.0.0.1", 9876)
    assert (flags.levels.levels, flags.log_json, flags.unknown) == ((), False, ())


def test_values_come_with_an_equals_sign_or_as_the_next_word() -> None:
    for words in (
        ["--ctrlz_port=0", "--ctrlz_address=::1", "--log_output_level=cni-agent:debug"],
        ["--ctrlz_port", "0", "--ctrlz_address", "::1", "--log_output_level", "cni-agent:debug"],
    ):
        flags = RunFlags.parse(words)
        assert (flags.controlz_host, flags.controlz_port) == ("::1", 0)
        assert flags.levels.levels == ((SCOPES["cni-agent"], Level.DEBUG),)


@pytest.mark.parametrize(
    ("words", "json"),
    [(["--log_as_json"], True), (["--log_as_json=true"], True), (["--log_as_json=false"], False)],
)
def test_the_log_may_be_json(words: list[str], json: bool) -> None:
    assert RunFlags.parse(words).log_json is json


def test_the_references_other_flags_of_the_log_are_taken() -> None:
    words = ["--log_target", "stdout", "--log_caller=all", "--log_stacktrace_level=default:none"]
    assert RunFlags.parse(words) == RunFlags.parse([])


@pytest.mark.parametrize("word", ["extra", "--log_output=debug", "--ctrlz=1", "-v"])
def test_other_words_are_given_back(word: str) -> None:
    assert RunFlags.parse([word]).unknown == (word,)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--ctrlz_port=x", "invalid flag --ctrlz_port='x': not a port"),
        ("--ctrlz_port=65536", "not a port"),
        ("--ctrlz_port", "expected one argument"),
        ("--ctrlz_address=*", "not a loopback address.*kubectl port-forward"),
        ("--ctrlz_address=0.0.0.0", "not a loopback address"),
        ("--ctrlz_address=10.0.0.1", "not a loopback address"),
        ("--ctrlz_address=::", "not a loopback address"),
        ("--log_output_level=loud", "invalid flag --log_output_level='loud': 'loud' has no level"),
        ("--log_as_json=perhaps", "not a boolean"),
    ],
)
def test_a_wrong_value_stops_the_start_and_says_why(word: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RunFlags.parse([word])
