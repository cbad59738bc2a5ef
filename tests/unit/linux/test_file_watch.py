from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ztunnel.linux.file_watch import FileWatch

LOOK, SETTLE = 1.0, 2.0


def a_watch(path: Path) -> FileWatch:
    return FileWatch(path, look_seconds=LOOK, settle_seconds=SETTLE)


@asynccontextmanager
async def waiting(watch: FileWatch) -> AsyncIterator[trio.Event]:
    """Wait for one change beside the block; the event says that it was told."""
    told = trio.Event()

    async def wait() -> None:
        await watch.changed()
        told.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        yield told
        nursery.cancel_scope.cancel()


def overwrite(path: Path) -> None:
    path.write_text("three")


def exchange(path: Path) -> None:
    """With a file of the same length and times."""
    fresh = path.with_suffix(".new")
    fresh.write_text(path.read_text())
    os.utime(fresh, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    fresh.rename(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [overwrite, exchange, touch, Path.unlink])
async def test_whatever_becomes_of_the_file_is_told(
    tmp_path: Path, autojump_clock: MockClock, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watch = a_watch(path)
    change(path)
    await watch.changed()
    assert trio.current_time() == pytest.approx(LOOK + SETTLE)


async def test_a_file_that_comes_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    watch = a_watch(tmp_path / "file")
    async with waiting(watch) as told:
        await trio.sleep(10 * LOOK)
        assert not told.is_set()
        (tmp_path / "file").touch()
        await told.wait()


async def test_what_stays_is_not_told_and_a_change_only_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watch = a_watch(path)
    overwrite(path)
    await watch.changed()
    async with waiting(watch) as told:
        await trio.sleep(100 * LOOK)
        assert not told.is_set()


async def test_a_file_that_is_still_written_is_waited_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    path = tmp_path / "file"
    path.touch()
    async with waiting(a_watch(path)) as told:
        for length in range(10):
            path.write_text("x" * length)
            await trio.sleep(0.9 * SETTLE)
            assert not told.is_set()
        await told.wait()
