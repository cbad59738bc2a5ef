from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.support.namespaces import open_descriptors
from ztunnel.errors import ConfigError, IdentityError
from ztunnel.inpod import zds
from ztunnel.inpod.zds import AgentLink, LinkState
from ztunnel.linux import fdpass, netns
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import (
    Add,
    Delete,
    Keep,
    PodInfo,
    Request,
    SnapshotSent,
    decode_ack,
    decode_hello,
    encode_request,
)

INFO = PodInfo("pod", Namespace("shop"), ServiceAccount("default"))
A, B = PodUid("a"), PodUid("b")


@dataclass
class Pods:
    """Serves pods by holding their namespaces; those in `broken` fail."""

    broken: dict[PodUid, Exception] = field(default_factory=dict)
    served: dict[PodUid, PodNetns] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        await trio.lowlevel.checkpoint()
        assert info == INFO
        self.calls.append(f"add {uid}")
        if uid in self.broken:
            raise self.broken[uid]
        self.served[uid] = netns

    async def remove(self, uid: PodUid) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(f"remove {uid}")
        if uid in self.served:
            self.served.pop(uid).close()

    async def reconcile(self, keep: frozenset[PodUid]) -> None:
        self.calls.append(f"reconcile {sorted(keep)}")
        for uid in self.served.keys() - keep:
            await self.remove(uid)


class Agent:
    """A node agent that says what the test tells it to."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "zds.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection: socket.socket | None = None

    def listen(self) -> None:
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.settimeout(0)

    async def accept(self) -> None:
        await trio.lowlevel.wait_readable(self._listener)
        if self._connection:
            self._connection.close()
        self._connection, _ = self._listener.accept()
        assert decode_hello(await self.receive()) == 1

    async def receive(self) -> bytes:
        assert self._connection is not None
        await trio.lowlevel.wait_readable(self._connection)
        return self._connection.recv(1024)

    async def say(self, data: bytes, *fds: int) -> str:
        assert self._connection is not None
        socket.send_fds(self._connection, [data], fds) if fds else self._connection.send(data)
        return decode_ack(await self.receive())

    async def ask(self, request: Request, namespace: str = "/proc/self/ns/net") -> str:
        """Send a request, an Add with a namespace, and return the answer's error."""
        if not isinstance(request, Add):
            return await self.say(encode_request(request))
        with PodNetns.open(namespace) as space:
            return await self.say(encode_request(request), space.fileno())

    async def send_until_hang_up(self, data: bytes) -> None:
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                await trio.lowlevel.wait_writable(self._connection)
                with contextlib.suppress(BlockingIOError):
                    self._connection.send(data)

    async def expect_hang_up(self) -> None:
        assert await self.receive() == b""

    def hang_up(self) -> None:
        assert self._connection is not None
        self._connection.close()

    def close(self) -> None:
        self._listener.close()
        if self._connection:
            self._connection.close()


@dataclass
class Scene:
    agent: Agent
    pods: Pods = field(default_factory=Pods)
    states: list[LinkState] = field(default_factory=list)

    async def play(self, script: Callable[[], Awaitable[None]], **options: float) -> None:
        link = AgentLink(self.agent.path, self.pods, on_state=self.states.append, **options)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                await script()
                nursery.cancel_scope.cancel()


@pytest.fixture
def scene() -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp())  # shorter than tmp_path: socket paths have 107 bytes
    scene = Scene(Agent(folder))
    before = open_descriptors()
    scene.agent.listen()
    try:
        yield scene
        scene.agent.close()
        for namespace in scene.pods.served.values():
            namespace.close()
        assert open_descriptors() <= before, "descriptors leaked"
    finally:
        scene.agent.close()
        shutil.rmtree(folder)


async def test_a_snapshot_makes_us_ready(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        assert await scene.agent.ask(Add(A, INFO)) == ""
        assert await scene.agent.ask(Keep(B)) == ""
        assert await scene.agent.ask(SnapshotSent()) == ""

    await scene.play(script)
    assert scene.pods.calls == ["add a", "reconcile ['a', 'b']"]
    assert scene.pods.served[A].id == netns.current()
    assert [state.is_ready for state in scene.states] == [False, True]


async def test_deletion_stops_a_pod(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(Add(A, INFO))
        await scene.agent.ask(SnapshotSent())
        assert await scene.agent.ask(Delete(A)) == ""

    await scene.play(script)
    assert scene.pods.calls == ["add a", "reconcile ['a']", "remove a"]


async def test_the_same_namespace_again_changes_nothing(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(Add(A, INFO))
        await scene.agent.ask(Add(A, INFO))

    await scene.play(script)
    assert scene.pods.calls == ["add a"]


async def test_another_namespace_replaces_the_pod(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "other").touch()

    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(Add(A, INFO))
        await scene.agent.ask(Add(A, INFO), str(tmp_path / "other"))

    await scene.play(script)
    assert scene.pods.calls == ["add a", "remove a", "add a"]
    assert scene.pods.served[A].id != netns.current()


@pytest.mark.parametrize("error", [OSError("port in use"), IdentityError("no certificate")])
async def test_a_pod_that_cannot_be_served_is_refused_and_tried_again(
    scene: Scene, error: Exception
) -> None:
    ready = trio.Event()
    scene.pods.broken = {A: error, B: error}

    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(SnapshotSent())
        assert await scene.agent.ask(Add(A, INFO)) == f"failed to start proxy : {error}"
        assert scene.states[-1].pending == {A}
        assert not scene.states[-1].is_ready
        assert await scene.agent.ask(Add(B, INFO)) != ""
        scene.pods.broken.clear()
        await ready.wait()

    def on_state(state: LinkState) -> None:
        scene.states.append(state)
        if state.is_ready and A in scene.pods.served:
            ready.set()

    link = AgentLink(scene.agent.path, scene.pods, on_state=on_state, retry_seconds=0.05)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            await script()
            nursery.cancel_scope.cancel()
    assert scene.pods.served.keys() == {A, B}


async def test_a_pending_pod_that_is_deleted_is_let_go(scene: Scene) -> None:
    scene.pods.broken[A] = OSError("port in use")

    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(SnapshotSent())
        await scene.agent.ask(Add(A, INFO))
        assert await scene.agent.ask(Delete(A)) == ""
        assert await scene.agent.ask(Delete(B)) == ""

    await scene.play(script)
    assert scene.states[-1] == LinkState(connected=True, has_snapshot=True)


async def test_pods_are_served_on_across_a_reconnect(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(Add(A, INFO))
        await scene.agent.ask(SnapshotSent())
        scene.agent.hang_up()
        await scene.agent.accept()
        assert scene.pods.served.keys() == {A}
        await scene.agent.ask(Keep(A))
        await scene.agent.ask(SnapshotSent())

    await scene.play(script)
    assert scene.pods.calls == ["add a", "reconcile ['a']", "reconcile ['a']"]
    readiness = [state.is_ready for state in scene.states]
    assert readiness == [False, True, False, False, True]


async def nothing_more(scene: Scene) -> None:
    await scene.agent.expect_hang_up()
    await scene.agent.accept()


async def test_a_message_that_makes_no_sense_is_refused_and_ends_the_connection(
    scene: Scene,
) -> None:
    async def script() -> None:
        await scene.agent.accept()
        assert "unknown kind" in await scene.agent.say(b"\x22\x00")
        await nothing_more(scene)

    await scene.play(script)


async def test_an_add_without_a_namespace_is_refused(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        assert await scene.agent.say(encode_request(Add(A, INFO))) == "missing descriptor"
        await nothing_more(scene)

    await scene.play(script)
    assert scene.pods.calls == []


@pytest.mark.parametrize("count", [1, 2])
async def test_descriptors_that_do_not_belong_are_closed(scene: Scene, count: int) -> None:
    async def script() -> None:
        await scene.agent.accept()
        with PodNetns.open("/dev/null") as file:
            problem = await scene.agent.say(encode_request(Delete(A)), *[file.fileno()] * count)
        assert "descriptor" in problem
        await nothing_more(scene)

    await scene.play(script)


async def test_a_message_that_is_too_long_is_refused(scene: Scene) -> None:
    async def script() -> None:
        await scene.agent.accept()
        assert "longer than" in await scene.agent.say(b"x" * (fdpass.READ_BYTES + 1))
        await nothing_more(scene)

    await scene.play(script)


async def test_an_agent_that_reads_no_answers_is_left(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zds, "SEND_SECONDS", 0.05)

    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.send_until_hang_up(encode_request(Keep(A)))
        await scene.agent.accept()

    await scene.play(script)


async def test_an_unforeseen_error_of_the_handler_is_not_hidden(scene: Scene) -> None:
    scene.pods.broken[A] = LookupError("a bug")

    async def script() -> None:
        await scene.agent.accept()
        await scene.agent.ask(Add(A, INFO))

    with pytest.RaisesGroup(pytest.RaisesExc(LookupError), allow_unwrapped=False):
        await scene.play(script)


async def test_an_agent_that_comes_later_is_found(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    scene = Scene(Agent(folder))

    async def script() -> None:
        await trio.sleep(0.05)
        scene.agent.listen()
        await scene.agent.accept()
        await scene.agent.ask(SnapshotSent())

    try:
        await scene.play(script)
        assert scene.states[-1].is_ready
    finally:
        scene.agent.close()
        shutil.rmtree(folder)


async def test_startup_errors_of_a_pod_are_not_ours(scene: Scene) -> None:
    scene.pods.broken[A] = ConfigError("bad setting")

    async def script() -> None:
        await scene.agent.accept()
        assert "bad setting" in await scene.agent.ask(Add(A, INFO))

    await scene.play(script)
