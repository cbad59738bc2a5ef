from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cni.agent import kube as kube_module
from cni.agent.errors import KubeError
from cni.agent.kube import Collection, Watcher, annotate, fetch_pod, pod_path
from cni.agent.kube_http import KubeClient
from cni.agent.mirror import Change, Removed
from cni.agent.objects import KubePod, Redirection, decode_pod
from tests.support.kube import FakeKube, a_pod, eventually, running
from ztunnel.model.identity import Namespace

SHOP = Namespace("shop")


class Follower:
    """Collects what a watcher tells."""

    def __init__(self, kube: FakeKube) -> None:
        assert kube.server is not None
        self.names: set[str] = set()
        self.events: list[tuple[str, str]] = []
        self._changed = trio.Event()
        query = {"fieldSelector": "spec.nodeName=node"}
        pods = Collection("pods", "/api/v1/pods", decode_pod, query)
        self.watcher = Watcher(KubeClient(kube.server), pods, self.take, rng=random.Random(1))

    def take(self, changes: list[Change[KubePod]]) -> None:
        for change in changes:
            gone = isinstance(change, Removed)
            self.events.append(("gone" if gone else "put", change.item.name))
            (self.names.discard if gone else self.names.add)(change.item.name)
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, *names: str) -> None:
        with trio.fail_after(10):
            while self.names != set(names):
                await self._changed.wait()


@asynccontextmanager
async def following(kube: FakeKube, **more: object) -> AsyncIterator[Follower]:
    async with running(kube, **more):
        follower = Follower(kube)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.watcher.run)
            yield follower
            nursery.cancel_scope.cancel()


async def test_a_list_of_several_pages_then_changes_as_they_come() -> None:
    kube = FakeKube()
    kube.put(*(a_pod(name) for name in "abcde"), a_pod("elsewhere", node="other"))
    async with following(kube) as follower:
        await follower.watcher.synced.wait()
        assert follower.names == set("abcde")
        kube.put(a_pod("f"))
        await follower.until(*"abcdef")
        kube.remove("a")
        await follower.until(*"bcdef")
    lists = [request for request in kube.requests if "watch" not in request]
    assert len(lists) == 3
    assert follower.watcher.last_contact is not None


async def test_a_watch_that_ends_goes_on_without_listing_again() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with following(kube) as follower:
        await follower.until("a")
        kube.cut()
        kube.put(a_pod("b"))
        await follower.until("a", "b")
        kube.bookmark()
        kube.cut()
        kube.remove("a")
        await follower.until("b")
    assert follower.watcher.lists == 1


async def test_after_an_expired_version_the_list_tells_deletions_too() -> None:
    kube = FakeKube()
    kube.put(a_pod(), a_pod("b"))
    async with following(kube) as follower:
        await follower.until("a", "b")
        kube.remove("a")
        kube.put(a_pod("c"))
        kube.compact()
        await follower.until("b", "c")
        assert ("gone", "a") in follower.events


@pytest.mark.parametrize("status", [410, 429, 500, 503])
async def test_a_refused_request_is_repeated(status: int) -> None:
    kube = FakeKube(refuse=[status, status])
    kube.put(a_pod())
    async with following(kube) as follower:
        await follower.until("a")


async def test_a_watch_refused_as_expired_leads_to_a_list() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with following(kube) as follower:
        await follower.until("a")
        kube.refuse = [410]
        kube.remove("a")
        kube.cut()
        await follower.until()
        await eventually(lambda: follower.watcher.lists == 2)


async def test_after_a_servers_restart_the_list_does_not_wait_as_long_as_the_server_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await trio.lowlevel.checkpoint()

    kube = FakeKube()
    kube.put(a_pod())
    async with following(kube) as follower:
        await follower.until("a")
        monkeypatch.setattr(trio, "sleep", note)
        kube.refuse = [503] * 6 + [410]  # as a real server: its watch cache begins anew
        kube.put(a_pod("b"))
        kube.compact()
        await follower.until("a", "b")
    *away, expired = pauses
    assert max(away) > 10 * kube_module.FIRST_DELAY_SECONDS
    assert expired <= kube_module.FIRST_DELAY_SECONDS


async def test_while_the_server_is_down_we_keep_what_we_know_and_come_back() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with following(kube) as follower:
        await follower.until("a")
        kube.stop()
        kube.put(a_pod("b"))
        await trio.sleep(0.05)
        assert follower.names == {"a"}
        kube.is_down = False
        await follower.until("a", "b")


async def test_a_rotated_token_is_taken_up(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one")
    kube = FakeKube(token="one")
    kube.put(a_pod())
    async with following(kube, token=token) as follower:
        await follower.until("a")
        kube.token = "two"
        kube.cut()
        token.write_text("two")
        kube.put(a_pod("b"))
        await follower.until("a", "b")


async def test_a_server_that_never_ends_a_watch_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WATCH_SECONDS", "WATCH_GRACE_SECONDS", "REQUEST_SECONDS"):
        monkeypatch.setattr(kube_module, name, 0.01)
    kube = FakeKube()
    async with following(kube) as follower:
        await follower.watcher.synced.wait()
        await eventually(lambda: sum("watch=true" in one for one in kube.requests) >= 2)


async def test_a_single_pod_is_fetched() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with running(kube):
        assert kube.server is not None
        client = KubeClient(kube.server)
        pod = await fetch_pod(client, SHOP, "a")
        assert pod is not None
        assert pod.uid == "uid-shop-a"
        assert await fetch_pod(client, SHOP, "b") is None
        kube.refuse = [500]
        with pytest.raises(KubeError):
            await fetch_pod(client, SHOP, "a")


async def test_the_annotation_is_written_and_taken_away() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with running(kube):
        assert kube.server is not None
        client = KubeClient(kube.server)
        pod = await fetch_pod(client, SHOP, "a")
        assert pod is not None
        assert await annotate(client, pod, Redirection.ENABLED)
        assert kube.status() == "enabled"
        assert await annotate(client, pod, None)
        assert kube.status() is None


async def test_a_successor_of_the_same_name_is_not_annotated() -> None:
    kube = FakeKube()
    kube.put(a_pod(uid="old"))
    async with running(kube):
        assert kube.server is not None
        client = KubeClient(kube.server)
        pod = await fetch_pod(client, SHOP, "a")
        assert pod is not None
        kube.remove("a")
        assert not await annotate(client, pod, Redirection.ENABLED)
        kube.put(a_pod(uid="new"))
        assert not await annotate(client, pod, Redirection.ENABLED)
        assert kube.status() is None
        kube.fail_patches = 1
        kube.put(a_pod(uid="old"))
        with pytest.raises(KubeError):
            await annotate(client, pod, Redirection.ENABLED)


def test_names_cannot_change_the_path() -> None:
    assert pod_path("n", "../secrets/x?y") == "/api/v1/namespaces/n/pods/..%2Fsecrets%2Fx%3Fy"
