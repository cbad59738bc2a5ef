from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from cni.agent import zds_connection
from cni.agent.errors import ProxyLostError, ProxyRefusedError
from cni.agent.zds_connection import BACKLOG_MAX, EnrolledPod, ProxyConnection
from tests.support.namespaces import open_descriptors
from ztunnel.errors import PeerError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import Add, Delete, PodInfo, SnapshotSent, encode_hello, encode_request

INFO = PodInfo("pod", Namespace("shop"), ServiceAccount("default"))
A = PodUid("a")
ACK = b"\x0a\x00"


class Scene:
    def __init__(self) -> None:
        near, self.proxy = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.proxy.settimeout(0)
        self.pods: dict[PodUid, EnrolledPod] = {}
        self.ready = trio.Event()
        self.connection = ProxyConnection(
            trio.socket.from_stdlib_socket(near), self.pods, on_ready=self.ready.set
        )

    async def receive(self) -> bytes:
        await trio.lowlevel.wait_readable(self.proxy)
        return self.proxy.recv(1024)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.connection.run)
                yield

    async def snapshot(self) -> None:
        self.proxy.send(encode_hello())
        assert await self.receive() == encode_request(SnapshotSent())
        self.proxy.send(ACK)
        await self.ready.wait()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    before = open_descriptors()
    scene = Scene()
    yield scene
    scene.connection.close()
    scene.proxy.close()
    assert open_descriptors() <= before, "descriptors leaked"


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zds_connection, "ANSWER_SECONDS", 0.05)


async def test_requests_are_sent_one_at_a_time_in_order(scene: Scene) -> None:
    with pytest.RaisesGroup(ProxyLostError, flatten_subgroups=True):
        async with scene.running():
            jobs = [scene.connection.submit(Delete(PodUid(uid))) for uid in "ab"]
            await scene.snapshot()
            for uid, job in zip("ab", jobs, strict=True):
                assert await scene.receive() == encode_request(Delete(PodUid(uid)))
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(BlockingIOError):
                    scene.proxy.recv(1024)
                scene.proxy.send(ACK)
                await job.done.wait()
                assert job.error is None
            scene.proxy.close()


@pytest.mark.usefixtures("short_deadline")
async def test_a_proxy_that_does_not_answer_is_cut_off(scene: Scene) -> None:
    with pytest.RaisesGroup(trio.TooSlowError, flatten_subgroups=True):
        async with scene.running():
            await scene.snapshot()
            job = scene.connection.submit(Delete(A))
    scene.connection.close()
    assert isinstance(job.error, ProxyLostError)
    assert job.done.is_set()


@pytest.mark.usefixtures("short_deadline")
async def test_a_proxy_that_does_not_say_hello_is_cut_off(scene: Scene) -> None:
    with pytest.RaisesGroup(trio.TooSlowError, flatten_subgroups=True):
        async with scene.running():
            pass
    assert not scene.connection.is_ready


async def test_a_packet_that_nobody_asked_for_ends_the_connection(scene: Scene) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(PeerError, match="unexpected"), flatten_subgroups=True
    ):
        async with scene.running():
            await scene.snapshot()
            scene.proxy.send(ACK)


async def test_a_descriptor_from_the_proxy_ends_the_connection(scene: Scene) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(ProxyLostError, match="descriptor"), flatten_subgroups=True
    ):
        async with scene.running():
            socket.send_fds(scene.proxy, [encode_hello()], [scene.proxy.fileno()])


async def test_a_pod_that_was_removed_meanwhile_is_not_sent(scene: Scene) -> None:
    with pytest.RaisesGroup(ProxyLostError, flatten_subgroups=True):
        async with scene.running():
            await scene.snapshot()
            job = scene.connection.submit(Add(A, INFO))
            await job.done.wait()
            assert isinstance(job.error, ProxyRefusedError)
            scene.proxy.close()


async def test_a_pod_is_sent_with_its_namespace(scene: Scene) -> None:
    with (
        PodNetns.open("/proc/self/ns/net") as space,
        pytest.RaisesGroup(ProxyLostError, flatten_subgroups=True),
    ):
        async with scene.running():
            await scene.snapshot()
            scene.pods[A] = EnrolledPod(INFO, space)
            scene.connection.submit(Add(A, INFO))
            await trio.lowlevel.wait_readable(scene.proxy)
            data, fds, _, _ = socket.recv_fds(scene.proxy, 1024, 4)
            assert data == encode_request(Add(A, INFO))
            with PodNetns(fds[0]) as received:
                assert received.id == space.id
            assert scene.connection.told == {A}
            scene.proxy.close()


async def test_a_request_too_many_is_refused_at_once(scene: Scene) -> None:
    jobs = [scene.connection.submit(Delete(A)) for _ in range(BACKLOG_MAX + 1)]
    assert [job.done.is_set() for job in jobs] == [False] * BACKLOG_MAX + [True]
    scene.connection.close()
    assert all(isinstance(job.error, ProxyLostError) for job in jobs)
    assert scene.connection.submit(Delete(A)).done.is_set()
