from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ztunnel.errors import LimitError, RouteError
from ztunnel.workers import questions as module
from ztunnel.workers.questions import Questions


class Scene:
    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.questions = Questions(lambda turn, what: self.asked.append((turn, what)))
        self.outcomes: dict[str, str] = {}

    async def fetch(self, what: str) -> None:
        try:
            self.outcomes[what] = await self.questions.fetch(what)
        except (RouteError, LimitError) as error:
            self.outcomes[what] = str(error)


async def test_each_answer_finds_its_question(nursery: trio.Nursery) -> None:
    scene = Scene()
    for what in ("/10.0.0.1", "/10.0.0.2"):
        nursery.start_soon(scene.fetch, what)
    await wait_all_tasks_blocked()
    for turn, what in reversed(scene.asked):
        answer, error = ("known", "") if what.endswith("1") else (None, "the stream is down")
        scene.questions.learned(turn, answer, error)
    await wait_all_tasks_blocked()
    assert scene.outcomes == {"/10.0.0.1": "known", "/10.0.0.2": "the stream is down"}


async def test_without_an_answer_nobody_waits_for_ever(autojump_clock: MockClock) -> None:
    scene = Scene()
    await scene.fetch("/10.0.0.1")
    assert "no answer from the control process" in scene.outcomes["/10.0.0.1"]
    scene.questions.learned(scene.asked[0][0], "known", "")  # too late


async def test_questions_under_way_have_a_limit(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NAMES_MAX", 1)
    scene = Scene()
    nursery.start_soon(scene.fetch, "/10.0.0.1")
    await wait_all_tasks_blocked()
    await scene.fetch("/10.0.0.2")
    assert "being asked for already" in scene.outcomes["/10.0.0.2"]
    nursery.cancel_scope.cancel()
