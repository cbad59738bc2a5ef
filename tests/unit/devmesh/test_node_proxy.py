from __future__ import annotations

import pytest
import trio

from ztunnel.devmesh.node_proxy import LogLines


def test_lines_are_whole_however_they_come() -> None:
    lines = LogLines()
    for piece in (b"one\ntw", b"o", b"\nthr", b"ee"):
        lines.feed(piece)
    assert lines.all == ["one", "two"]
    assert lines.find("t", "o") == "two"
    assert lines.find("one", since=1) is None


async def test_waiting_ends_when_the_line_comes() -> None:
    lines = LogLines()
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await trio.testing.wait_all_tasks_blocked()
            lines.feed(b"other\nthe wanted line\n")

        nursery.start_soon(write)
        assert await lines.wait_for("wanted") == "the wanted line"


async def test_waiting_for_a_process_that_has_ended_ends_at_once() -> None:
    lines = LogLines()
    lines.end()
    with pytest.raises(trio.TooSlowError):
        await lines.wait_for("wanted", seconds=1000)
