from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.workers import output as module
from ztunnel.workers.output import Lines


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"))), st.data())
def test_cut_anywhere_the_same_lines_come_out(texts: list[str], data: st.DataObject) -> None:
    printed = "".join(f"{text}\n" for text in texts).encode()
    lines, found = Lines(), []
    while printed:
        size = data.draw(st.integers(1, len(printed)))
        found += lines.receive(printed[:size])
        printed = printed[size:]
    assert found == [f"{text}\n" for text in texts]
    assert lines.end() == []


def test_the_last_words_are_a_line_too() -> None:
    lines = Lines()
    assert lines.receive(b"one\ntwo") == ["one\n"]
    assert lines.end() == ["two\n"]
    assert lines.end() == []


def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 4)
    lines = Lines()
    assert lines.receive(b"123456789") == ["1234\n", "5678\n"]
    assert lines.receive(b"\n") == ["9\n"]


def test_bytes_that_are_no_text_do_no_harm() -> None:
    assert Lines().receive(b"\xff\n") == ["\ufffd\n"]
