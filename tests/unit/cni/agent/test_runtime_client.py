from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trio

from cni.agent import runtime_client
from cni.agent.runtime_client import RuntimeClient
from tests.support.kube import eventually
from tests.support.namespaces import open_descriptors
from ztunnel.model.workload import PodUid
from ztunnel.wire import cri
from ztunnel.wire.pb import cri_pb2

A, B = PodUid("a"), PodUid("b")


class ScriptedRuntime(grpc.GenericRpcHandler):
    """A runtime with these sandboxes: id, uid, when it was made, path of its namespace."""

    def __init__(self, *sandboxes: tuple[str, str, int, str]) -> None:
        self.sandboxes = sandboxes
        self.refuses = False
        self.asked: list[str] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        answer = {cri.LIST_PATH: self.list, cri.STATUS_PATH: self.status}
        return grpc.unary_unary_rpc_method_handler(answer[handler_call_details.method])

    def list(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        if self.refuses:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        items = [
            cri_pb2.PodSandbox(id=one, metadata={"uid": uid}, created_at=created)
            for one, uid, created, _ in self.sandboxes
        ]
        return cri_pb2.ListPodSandboxResponse(items=items).SerializeToString()

    def status(self, data: bytes, _: grpc.ServicerContext) -> bytes:
        asked = cri_pb2.PodSandboxStatusRequest.FromString(data)
        self.asked.append(asked.pod_sandbox_id)
        (path,) = (path for one, _, _, path in self.sandboxes if one == asked.pod_sandbox_id)
        spec = {"linux": {"namespaces": [{"type": "network", "path": path}]}}
        info = {"info": json.dumps({"runtimeSpec": spec})} if path != "broken" else {}
        return cri_pb2.PodSandboxStatusResponse(info=info).SerializeToString()


class Scene:
    """A socket at which a runtime listens, or does not."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "r.sock"
        self._server: grpc.Server | None = None
        self.client = RuntimeClient((folder / "none.sock", self.path))

    def start(self, *sandboxes: tuple[str, str, int, str]) -> ScriptedRuntime:
        runtime = ScriptedRuntime(*sandboxes)
        self._server = grpc.server(ThreadPoolExecutor(2), handlers=[runtime])
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()
        return runtime

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="rt") as folder:  # short: it holds a socket
        scene = Scene(Path(folder))
        yield scene
        scene.stop()


async def test_only_the_pods_that_are_asked_for_are_told(scene: Scene) -> None:
    runtime = scene.start(("1", "a", 5, "/run/netns/1"), ("2", "b", 5, "/run/netns/2"))
    assert await scene.client.paths_of({A}) == ({A: "/run/netns/1"}, [])
    assert runtime.asked == ["1"]
    assert await scene.client.paths_of({PodUid("c")}) == ({}, [])
    assert await scene.client.paths_of(set()) == ({}, [])


async def test_of_several_sandboxes_the_latest_counts(scene: Scene) -> None:
    scene.start(("1", "a", 5, "/1"), ("2", "a", 9, "/2"), ("3", "a", 7, "/3"))
    assert await scene.client.paths_of({A}) == ({A: "/2"}, [])


async def test_a_pod_on_the_hosts_network_has_no_path(scene: Scene) -> None:
    scene.start(("1", "a", 5, ""))
    assert await scene.client.paths_of({A}) == ({}, [])


async def test_without_a_socket_nobody_is_asked(scene: Scene) -> None:
    assert await scene.client.paths_of({A}) == ({}, [])
    assert await RuntimeClient(()).paths_of({A}) == ({}, [])


async def test_a_runtime_that_refuses_is_named(scene: Scene) -> None:
    scene.start(("1", "a", 5, "/1")).refuses = True
    reason = f"container runtime at {scene.path}: UNAVAILABLE: not now"
    assert await scene.client.paths_of({A}) == ({}, [reason])


async def test_what_was_told_before_a_failure_counts(scene: Scene) -> None:
    scene.start(("1", "a", 5, "/1"), ("2", "b", 5, "broken"))
    found, (problem,) = await scene.client.paths_of({A, B})
    assert found.items() <= {A: "/1"}.items()
    assert "not a sandbox's status" in problem


async def test_a_socket_that_nobody_listens_at_is_named(scene: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(scene.path))
    found, (problem,) = await scene.client.paths_of({A})
    assert found == {}
    assert problem == f"container runtime at {scene.path}: [Errno 111] Connection refused"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"", "UNAVAILABLE: the server closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "UNAVAILABLE: the server breaks HTTP/2"),
        (None, "no answer in time"),
    ],
    ids=["hangs up", "another protocol", "is silent"],
)
async def test_a_runtime_that_does_not_speak_as_it_should_is_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, complaint: str
) -> None:
    if answer is None:
        monkeypatch.setattr(runtime_client, "CALL_SECONDS", 0.2)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            if answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(answer)

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(scene.path))
        sock.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            found, (problem,) = await scene.client.paths_of({A})
            nursery.cancel_scope.cancel()
    assert found == {}
    assert problem.startswith(f"container runtime at {scene.path}: {complaint}")


async def test_an_answer_has_a_limit(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_client, "ANSWER_BYTES_MAX", 100_000)
    scene.start(*[(f"sandbox-{n}", f"u{n}", n, "/x") for n in range(10_000)])
    _, (problem,) = await scene.client.paths_of({A})
    assert "RESOURCE_EXHAUSTED: an answer over 100000 bytes" in problem


async def test_a_long_list_comes_whole(scene: Scene) -> None:
    scene.start(*[(f"sandbox-{n}", f"u{n}", n, "/x") for n in range(10_000)])
    assert await scene.client.paths_of({PodUid("u9999")}) == ({"u9999": "/x"}, [])


async def test_asking_again_and_again_opens_nothing_that_stays(scene: Scene) -> None:
    scene.start(("1", "a", 5, "/1"))
    await scene.client.paths_of({A})
    before = open_descriptors()
    for _ in range(20):
        assert await scene.client.paths_of({A}) == ({A: "/1"}, [])
    # The other ends are ours, too, and closed a little later.
    await eventually(lambda: open_descriptors() <= before)
