from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.telemetry.writer import LineWriter

PIPE_BYTES = 4096


class Pipe:
    """A small pipe; the reading end does not block."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self.reader, False)

    def read(self) -> bytes:
        taken = b""
        try:
            while piece := os.read(self.reader, 65536):
                taken += piece
        except BlockingIOError:
            pass
        return taken

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        for end in (self.reader, self.writer):
            if end >= 0:
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def test_without_a_loop_a_line_goes_out_at_once(pipe: Pipe) -> None:
    LineWriter(pipe.writer).write("one\n")
    assert pipe.read() == b"one\n"


def test_without_a_reader_lines_are_counted_and_nothing_fails(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    pipe.close_reader()
    writer.write("one\n")
    writer.write("two\n")
    assert writer.dropped == 2


def test_a_reader_that_stands_still_costs_lines_not_time(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    os.write(pipe.writer, b"x" * PIPE_BYTES)
    writer.flush(0)
    writer._unreported = 1  # so that we do not wait for a farewell
    writer.write("one\n")
    assert writer.dropped == 1


def test_a_line_cut_off_by_a_full_pipe_is_ended_before_the_next(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    writer._unreported = 1
    writer.write("a" * (PIPE_BYTES + 10) + "\n")
    assert pipe.read() == b"a" * PIPE_BYTES
    writer.write("b\n")
    assert pipe.read() == b"\nb\n"


async def test_lines_come_out_whole_and_in_order_however_slow_the_reader(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    sent = "".join(f"{number} {'x' * 50}\n" for number in range(1000))
    taken = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.testing.wait_all_tasks_blocked()
        for line in sent.splitlines(keepends=True):
            writer.write(line)
        while len(taken) < len(sent):
            await trio.lowlevel.wait_readable(pipe.reader)
            taken += pipe.read()
        nursery.cancel_scope.cancel()
    assert taken.decode() == sent
    assert writer.dropped == 0


async def test_a_full_buffer_drops_the_newest_and_says_how_many(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer, lines_max=3)
    writer.report = lambda lost: f"lost {lost}\n"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            writer.write(f"{number}\n")
        taken = b""
        while b"lost" not in taken:
            await trio.lowlevel.wait_readable(pipe.reader)
            taken += pipe.read()
        nursery.cancel_scope.cancel()
    assert taken == b"0\n1\n2\nlost 2\n"
    assert writer.dropped == 2


async def test_what_is_left_at_the_end_is_written(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.testing.wait_all_tasks_blocked()
        writer.write("last words\n")
        nursery.cancel_scope.cancel()
    assert pipe.read() == b"last words\n"
    writer.write("after the loop\n")
    assert pipe.read() == b"after the loop\n"


async def test_a_reader_that_leaves_while_we_run_costs_only_lines(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.testing.wait_all_tasks_blocked()
        pipe.close_reader()
        writer.write("nobody\n")
        nursery.cancel_scope.cancel()
    assert writer.dropped == 1


async def test_a_regular_file_works_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = LineWriter(file.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.testing.wait_all_tasks_blocked()
            writer.write("to a file\n")
            nursery.cancel_scope.cancel()
    assert path.read_text() == "to a file\n"
