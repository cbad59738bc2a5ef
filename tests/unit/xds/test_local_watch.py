from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing
import trio

from tests.support.builders import a_policy, a_service, a_store, a_workload
from ztunnel.linux.file_watch import FileWatch
from ztunnel.model.workload import WorkloadUid
from ztunnel.state.store import Changes, Store, Update
from ztunnel.xds import local_watch
from ztunnel.xds.local import parse_local_config
from ztunnel.xds.local_watch import ITEMS_PER_STEP, LocalConfigWatch, difference_of

A, B = a_workload("a", uid="a"), a_workload("b", uid="b", ips=["192.0.2.11"])
SERVICE, POLICY = a_service(), a_policy()


def a_file(*names: str, more: str = "") -> str:
    """A configuration of these workloads."""
    pods = [
        f"{{uid: {name}, name: {name}, namespace: shop, workloadIps: [], services: {{}}}}"
        for name in names
    ]
    return f"workloads: [{', '.join(pods)}]\n{more}"


class Followed:
    """A file that is followed, and a store beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store()
        self.loads: list[bool] = []
        self.changes: list[Changes] = []
        self._more = trio.Event()
        self.store.subscribe(self.changes.append)
        watch = FileWatch(path, look_seconds=0.005, settle_seconds=0.01)
        applied = parse_local_config(path.read_text(), source=str(path))
        self.store.apply(applied)
        self.watch = LocalConfigWatch(watch, self.store, applied, on_load=self._on_load)

    def _on_load(self, is_loaded: bool) -> None:
        self.loads.append(is_loaded)
        self._more.set()

    async def loaded(self, number: int) -> bool:
        """Wait for so many attempts and return how the last one went."""
        with trio.fail_after(5):
            while len(self.loads) < number:
                self._more = trio.Event()
                await self._more.wait()
        return self.loads[-1]

    @property
    def names(self) -> set[str]:
        return {workload.name for workload in self.store.workloads.all()}


@asynccontextmanager
async def following(path: Path, text: str) -> AsyncIterator[Followed]:
    path.write_text(text)
    followed = Followed(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(followed.watch.run)
        yield followed
        nursery.cancel_scope.cancel()


def overwrite(path: Path, text: str) -> None:
    path.write_text(text)


def exchange(path: Path, text: str) -> None:
    """As Kubernetes and careful editors do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)  # noqa: PTH105


@pytest.mark.parametrize("write", [overwrite, exchange])
async def test_only_what_differs_is_applied(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a", "b")) as followed:
        followed.changes.clear()
        write(path, a_file("b", "c"))
        assert await followed.loaded(1)
        assert followed.names == {"b", "c"}
        assert set().union(*(changes.workloads for changes in followed.changes)) == {"a", "c"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("workloads: ]", "mesh.yaml, line 1: not YAML"),
        (a_file("c", more="polices: []"), "mesh.yaml: document, line 2: unknown key `polices`"),
        ("workloads:\n- {uid: 1, namespace: x}", "mesh.yaml: workloads[0], line 2: "),
    ],
)
async def test_a_broken_file_keeps_the_old_state_and_says_where(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a")) as followed:
        with structlog.testing.capture_logs() as lines:
            path.write_text(text)
            assert not await followed.loaded(1)
        assert said in lines[-1]["error"]
        assert lines[-1]["log_level"] == "error"
        assert followed.names == {"a"}
        path.write_text(a_file("b"))
        assert await followed.loaded(2)
        assert followed.names == {"b"}


async def test_a_file_that_is_gone_keeps_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a")) as followed:
        path.unlink()
        assert not await followed.loaded(1)
        assert followed.names == {"a"}


async def test_bytes_that_are_no_text_are_an_error_like_others(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a")) as followed:
        path.write_bytes(b"\xff\xfe\xfd")
        assert not await followed.loaded(1)


async def test_a_file_without_a_reasonable_end_is_not_read_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a")) as followed:
        monkeypatch.setattr(local_watch, "FILE_BYTES_MAX", 1000)
        path.write_text(a_file("b") + "#" * 1000)
        assert not await followed.loaded(1)
        assert followed.names == {"a"}


async def test_what_changed_between_the_first_reading_and_the_watch_is_not_missed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(a_file("a"))
    followed = Followed(path)
    path.write_text(a_file("b"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(followed.watch.run)
        assert await followed.loaded(1)
        nursery.cancel_scope.cancel()
    assert followed.names == {"b"}


async def test_what_the_control_plane_said_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a", "b")) as followed:
        theirs = a_workload("b", uid="b", ips=["192.0.2.200"])
        followed.store.apply(Update(workloads=[theirs, a_workload("x", uid="x", ips=[])]))
        path.write_text(a_file())
        assert await followed.loaded(1)
        assert followed.names == {"b", "x"}
        assert followed.store.workloads.by_uid(WorkloadUid("b")) == theirs


async def test_a_large_change_goes_over_in_slices(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    names = [f"w-{number}" for number in range(3 * ITEMS_PER_STEP)]
    async with following(path, a_file()) as followed:
        path.write_text(a_file(*names))
        assert await followed.loaded(1)
        assert [len(changes.workloads) for changes in followed.changes] == [ITEMS_PER_STEP] * 3
        followed.changes.clear()
        path.write_text(a_file(*names[: ITEMS_PER_STEP // 2]))
        assert await followed.loaded(2)
        rest = ITEMS_PER_STEP // 2
        assert [len(changes.workloads) for changes in followed.changes] == [
            ITEMS_PER_STEP,
            ITEMS_PER_STEP,
            rest,
        ]


async def test_a_small_change_is_seen_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    async with following(path, a_file("a", "b")) as followed:
        followed.changes.clear()
        path.write_text(a_file("b", "c"))
        assert await followed.loaded(1)
        assert [changes.workloads for changes in followed.changes] == [{"a", "c"}]


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        pytest.param(
            Update(workloads=[A], services=[SERVICE], policies=[POLICY]),
            Update(workloads=[A], services=[SERVICE], policies=[POLICY]),
            Update(),
            id="nothing",
        ),
        pytest.param(
            Update(),
            Update(workloads=[A], services=[SERVICE], policies=[POLICY]),
            Update(workloads=(A,), services=(SERVICE,), policies=(POLICY,)),
            id="all is new",
        ),
        pytest.param(
            Update(workloads=[A, B], services=[SERVICE], policies=[POLICY]),
            Update(workloads=[B]),
            Update(
                removed_workloads=(A.uid,),
                removed_services=(SERVICE.key,),
                removed_policies=(POLICY.key,),
            ),
            id="gone",
        ),
    ],
)
def test_the_difference_of_two_versions(old: Update, new: Update, difference: Update) -> None:
    store = a_store(*old.workloads, *old.services, *old.policies)
    assert difference_of(old, new, store) == difference


def test_what_others_removed_is_not_removed_again() -> None:
    assert difference_of(Update(workloads=[A]), Update(), Store()) == Update()
