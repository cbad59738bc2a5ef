from __future__ import annotations

import pytest

from cni.install.shutdown import Answer, ShutdownRules, Verdict, decide_shutdown

AMBIENT = ShutdownRules(ambient_enabled=True, safe_upgrade_disabled=False, has_own_file=False)
OWN_FILE = ShutdownRules(ambient_enabled=True, safe_upgrade_disabled=False, has_own_file=True)
OFF = ShutdownRules(ambient_enabled=False, safe_upgrade_disabled=False, has_own_file=True)
UNSAFE = ShutdownRules(ambient_enabled=True, safe_upgrade_disabled=True, has_own_file=True)


@pytest.mark.parametrize(
    ("rules", "answer", "asked", "verdict"),
    [
        pytest.param(AMBIENT, Answer.WANTED, 1, Verdict.LEAVE, id="upgrade or reboot"),
        pytest.param(OWN_FILE, Answer.WANTED, 1, Verdict.LEAVE, id="upgrade with own file"),
        pytest.param(AMBIENT, Answer.NOT_HERE, 1, Verdict.CLEAN_UP, id="node is left"),
        pytest.param(AMBIENT, Answer.GOING, 1, Verdict.CLEAN_UP, id="uninstalled"),
        pytest.param(AMBIENT, Answer.UNAUTHORIZED, 1, Verdict.CLEAN_UP, id="permissions gone"),
        pytest.param(AMBIENT, Answer.UNKNOWN, 1, Verdict.CLEAN_UP, id="nobody answers"),
        pytest.param(OWN_FILE, Answer.UNKNOWN, 1, Verdict.ASK_AGAIN, id="own file, once"),
        pytest.param(OWN_FILE, Answer.UNKNOWN, 2, Verdict.ASK_AGAIN, id="own file, twice"),
        pytest.param(OWN_FILE, Answer.UNKNOWN, 3, Verdict.LEAVE, id="own file, no more retries"),
    ],
)
def test_what_becomes_of_the_plugin(
    rules: ShutdownRules, answer: Answer, asked: int, verdict: Verdict
) -> None:
    assert decide_shutdown(rules, answer, asked=asked) is verdict


@pytest.mark.parametrize("rules", [OFF, UNSAFE])
@pytest.mark.parametrize("answer", list(Answer))
def test_nobody_is_asked_where_the_answer_does_not_matter(
    rules: ShutdownRules, answer: Answer
) -> None:
    assert not rules.needs_answer()
    assert decide_shutdown(rules, answer, asked=1) is Verdict.CLEAN_UP


def test_the_question_is_asked_where_it_matters() -> None:
    assert AMBIENT.needs_answer()
