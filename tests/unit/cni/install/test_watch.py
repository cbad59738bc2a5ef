from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cni.install.watch import Watch

SOON = 5.0


def rename(folder: Path) -> None:
    (folder / "old").rename(folder / "new")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "x").write_text("x"), id="made"),
        pytest.param(lambda folder: (folder / "old").write_text("x"), id="written"),
        pytest.param(lambda folder: (folder / "old").unlink(), id="deleted"),
        pytest.param(rename, id="renamed"),
        pytest.param(lambda folder: (folder / "old").chmod(0), id="permissions"),
    ],
)
async def test_a_change_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    (tmp_path / "old").touch()
    with Watch() as watch:
        assert watch.cover([tmp_path])
        change(tmp_path)
        with trio.fail_after(SOON):
            assert await watch.changed()
        assert not await watch.changed(at_most_seconds=0.01)


async def test_a_change_wakes_who_waits(tmp_path: Path) -> None:
    woken: list[bool] = []

    async def wait() -> None:
        woken.append(await watch.changed())

    with Watch() as watch:
        watch.cover([tmp_path])
        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                (tmp_path / "x").touch()
    assert woken == [True]


async def test_a_folder_that_comes_late_is_covered_by_asking_again(tmp_path: Path) -> None:
    late = tmp_path / "late"
    with Watch() as watch:
        assert not watch.cover([tmp_path, late])
        late.mkdir()
        with trio.fail_after(SOON):
            assert await watch.changed()
        assert watch.cover([tmp_path, late])
        (late / "x").touch()
        with trio.fail_after(SOON):
            assert await watch.changed()


async def test_without_inotify_it_is_only_a_matter_of_time(tmp_path: Path) -> None:
    watch = Watch()
    watch.close()
    watch.close()
    assert not watch.cover([tmp_path])
    assert not await watch.changed(at_most_seconds=0.01)


async def test_cancelled_while_waiting_it_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with trio.move_on_after(0.01) as scope:
        with Watch() as watch:
            watch.cover([tmp_path])
            await watch.changed()
    assert scope.cancelled_caught
    assert len(list(Path("/proc/self/fd").iterdir())) == before
