from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from cni.agent import zds_server
from cni.agent.errors import AgentError, NoProxyError, ProxyLostError, ProxyRefusedError
from cni.agent.zds_server import ZdsServer, serve_zds
from tests.support.namespaces import open_descriptors
from tests.support.zds import ScriptedProxy
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import Add, Delete, Keep, PodInfo, SnapshotSent, encode_ack

INFO = PodInfo("pod", Namespace("shop"), ServiceAccount("default"))
A, B, C = PodUid("a"), PodUid("b"), PodUid("c")


@pytest.fixture
def path() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp())  # shorter than tmp_path: socket paths have 107 bytes
    yield str(folder / "zds.sock")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_leaks(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(zds_server, "ACCEPT_SECONDS", 0.001)
    before = open_descriptors()
    yield
    assert open_descriptors() <= before, "descriptors leaked"


@pytest.fixture
def space() -> Iterator[PodNetns]:
    with PodNetns.open("/proc/self/ns/net") as space:
        yield space


async def test_a_proxy_is_told_about_all_pods(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with pytest.raises(NoProxyError):
            await server.add(A, INFO, space)
        server.keep(B)
        server.keep(A)
        with ScriptedProxy(path) as proxy:
            assert await proxy.snapshot() == [Add(A, INFO), Keep(B)]
            await server.wait_connected()
            assert server.connections == 1
            assert proxy.namespaces == {"a": netns.current()}


async def test_a_new_pod_waits_for_the_answer(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.add, A, INFO, space)
                assert await proxy.obey() == Add(A, INFO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.remove, A)
                assert await proxy.obey() == Delete(A)
        with ScriptedProxy(path) as proxy:
            assert await proxy.snapshot() == []


async def refused(server: ZdsServer, space: PodNetns, *, kind: type[AgentError]) -> None:
    with pytest.raises(kind) as failure:
        await server.add(A, INFO, space)
    assert str(failure.value)


async def test_a_refusal_is_reported_and_the_pod_comes_with_the_next_snapshot(
    path: str, space: PodNetns
) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            with pytest.RaisesGroup(pytest.RaisesExc(ProxyRefusedError, match="no port")):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.add, A, INFO, space)
                    await proxy.obey("no port")
        with ScriptedProxy(path) as proxy:
            assert await proxy.snapshot() == [Add(A, INFO)]


async def test_a_refusal_in_the_snapshot_does_not_end_it(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with pytest.raises(NoProxyError):
            await server.add(A, INFO, space)
        with ScriptedProxy(path) as proxy:
            proxy.hello()
            assert await proxy.obey("no port") == Add(A, INFO)
            assert await proxy.obey() == SnapshotSent()
            await server.wait_connected()


async def test_new_pods_go_to_the_newest_proxy_and_deletions_to_all(
    path: str, space: PodNetns
) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as old, ScriptedProxy(path) as new:
            await old.snapshot()
            await new.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.add, A, INFO, space)
                assert await new.obey() == Add(A, INFO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.remove, A)
                assert await new.obey() == Delete(A)
                assert await old.obey() == Delete(A)


async def test_a_proxy_without_its_snapshot_is_not_asked_first(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as old:
            await old.snapshot()
            with ScriptedProxy(path) as new:
                new.hello()
                assert await new.take() == SnapshotSent()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.add, A, INFO, space)
                    assert await old.obey() == Add(A, INFO)
                new.send(b"\x0a\x00")
                assert await new.obey() == Add(A, INFO)


async def test_if_the_newest_refuses_the_older_is_asked(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as old, ScriptedProxy(path) as new:
            await old.snapshot()
            await new.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.add, A, INFO, space)
                assert await new.obey("no port") == Add(A, INFO)
                assert await old.obey() == Add(A, INFO)


async def test_if_the_newest_ends_the_older_learns_what_it_missed(
    path: str, space: PodNetns
) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as old:
            await old.snapshot()
            with ScriptedProxy(path) as new:
                await new.snapshot()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.add, A, INFO, space)
                    await new.obey()
            assert await old.obey() == Add(A, INFO)
            assert server.connections == 1


async def test_a_proxy_that_ends_fails_what_waits_for_it(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server, trio.open_nursery() as nursery:
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            for _ in range(3):
                nursery.start_soon(lambda: refused(server, space, kind=ProxyLostError))
            await proxy.take()


async def test_a_deletion_fails_if_a_proxy_ends(path: str) -> None:
    async with serve_zds(path) as server:
        with pytest.RaisesGroup(ProxyLostError, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                with ScriptedProxy(path) as proxy:
                    await proxy.snapshot()
                    nursery.start_soon(server.remove, A)
                    await proxy.take()
        await server.remove(A)


async def test_waiting_for_a_proxy_survives_one_that_gives_up(path: str) -> None:
    async with serve_zds(path) as server, trio.open_nursery() as nursery:
        nursery.start_soon(server.wait_connected)
        with ScriptedProxy(path) as proxy:
            proxy.hello()
            await proxy.take()
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            await server.wait_connected()


async def test_names_that_do_not_fit_a_packet_are_refused(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with pytest.raises(AgentError, match="cannot tell"):
            await server.add(PodUid("x" * 1024), INFO, space)
        with pytest.raises(AgentError, match="cannot tell"):
            server.keep(PodUid("x" * 1024))
        with ScriptedProxy(path) as proxy:
            assert await proxy.snapshot() == []


async def test_too_many_proxies_are_turned_away(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zds_server, "CONNECTIONS_MAX", 1)
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as first, ScriptedProxy(path) as second:
            await first.snapshot()
            assert await second.take() is None
            assert server.connections == 1


class Listener:
    """Fails once; then nobody comes."""

    def __init__(self) -> None:
        self.calls = 0
        self.called_again = trio.Event()

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        if self.calls == 1:
            raise OSError("too many open files")
        self.called_again.set()
        await trio.sleep_forever()
        raise AssertionError


async def test_accepting_goes_on_after_an_error() -> None:
    listener = Listener()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ZdsServer().run, cast("trio.socket.SocketType", listener))
        with trio.fail_after(5):
            await listener.called_again.wait()
        nursery.cancel_scope.cancel()


async def test_a_server_may_know_pods_before_it_listens(path: str, space: PodNetns) -> None:
    server = ZdsServer()
    server.remember(A, INFO, space)
    server.keep(B)
    async with serve_zds(path, server):
        with ScriptedProxy(path) as proxy:
            assert await proxy.snapshot() == [Add(A, INFO), Keep(B)]
            assert server.is_ready
            assert [server.is_served(uid) for uid in (A, B)] == [True, False]


async def test_a_pod_is_served_once_a_proxy_has_said_so(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.add, A, INFO, space)
                await proxy.take()
                assert not server.is_served(A)
                proxy.send(encode_ack())
            assert server.is_served(A)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.remove, A)
                await proxy.obey()
            assert not server.is_served(A)


async def test_a_refused_pod_is_not_served(path: str, space: PodNetns) -> None:
    async with serve_zds(path) as server:
        with ScriptedProxy(path) as proxy:
            await proxy.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(refused, server, space, kind=ProxyRefusedError))
                await proxy.obey("no")
            assert not server.is_served(A)


async def test_a_proxy_that_comes_or_goes_is_a_change(path: str) -> None:
    async with serve_zds(path) as server:
        for _ in range(2):
            proxy = ScriptedProxy(path)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.wait_change)
                proxy.__enter__()
                await proxy.snapshot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.wait_change)
                await trio.testing.wait_all_tasks_blocked()
                proxy.__exit__(None, None, None)
            assert not server.is_ready
