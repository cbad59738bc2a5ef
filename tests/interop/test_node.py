"""Node's http2 on the other end, both ways: the peer whose faults we choose."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import peers
from tests.support.mesh import a_pod, call_refused, credentials, running_mesh
from tests.support.node_peer import doors, happened, running_node
from tests.support.programs import Program
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    pytest.mark.requires_program("node"),
]

CART, NODE = "10.244.1.10", "10.244.2.10"
CART_ID = "spiffe://cluster.local/ns/shop/sa/cart"
NODE_ID = "spiffe://cluster.local/ns/shop/sa/node"
ECHO, SINK, SOURCE, NOBODY = 8080, 8081, 8082, 8090
FAULTY = 9000  # and up: authorities at which Node misbehaves before or instead of dialling
BAGGAGE = "k8s.namespace.name=shop,k8s.pod.name=node"
APPLICATIONS = {ECHO: peers.echo, SINK: peers.sink, SOURCE: peers.source}
H2_INTERNAL_ERROR, H2_REFUSED_STREAM = 2, 7
SMALL_WINDOW = {"initialWindowSize": 1024}


def pods() -> list[object]:
    return [a_pod("cart", CART), a_pod("node", NODE, node="node-b", nativeTunnel=True)]


def a_node(
    mesh: DevMesh, folder: Path, role: str, **config: Any
) -> AbstractAsyncContextManager[Program]:
    return running_node(
        mesh.pods["node"], credentials(mesh, NODE_ID), folder, role=role, port=15008, **config
    )


def a_server(mesh: DevMesh, folder: Path, **config: Any) -> AbstractAsyncContextManager[Program]:
    return a_node(mesh, folder, "server", **config)


def a_client(
    mesh: DevMesh, folder: Path, *authorities: str, fault: Any = None, **config: Any
) -> AbstractAsyncContextManager[Program]:
    chosen = [{"authority": authority, "fault": fault} for authority in authorities]
    headers = {"baggage": BAGGAGE}
    return a_node(mesh, folder, "client", host=CART, doors=chosen, headers=headers, **config)


async def serve_applications(mesh: DevMesh, pod: str, nursery: trio.Nursery) -> None:
    for port, application in APPLICATIONS.items():
        await nursery.start(peers.serve, application, await mesh.listen(mesh.pods[pod], port))


async def check_all(mesh: DevMesh, pod: str, ip: str, ports: list[int], *, streams: int) -> None:
    """Echo, upload and download random bytes: half-close from either side first."""
    echo, sink, source = (partial(mesh.connect, mesh.pods[pod], ip, port) for port in ports)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(peers.echo_and_check, echo, streams=streams, size=100_000))
            nursery.start_soon(peers.upload_and_check, sink)
            nursery.start_soon(peers.download_and_check, source)


@pytest.mark.parametrize("settings", [{}, SMALL_WINDOW], ids=["usual windows", "1 KiB windows"])
async def test_node_calls_a_pod_of_ours(tmp_path: Path, settings: dict[str, int]) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await serve_applications(mesh, "cart", nursery)
        authorities = [f"{CART}:{port}" for port in APPLICATIONS]
        async with a_client(mesh, tmp_path, *authorities, settings=settings) as node:
            await check_all(mesh, "node", "127.0.0.1", doors(node), streams=14)
            answers = happened(node, "response")
            assert [answer["status"] for answer in answers] == [200] * 16
            assert all("k8s.namespace.name=shop" in answer["baggage"] for answer in answers)
            assert happened(node, "server")[0]["peer"] == CART_ID
        lines = mesh.proxies["node-a"].lines
        line = await lines.wait_for("connection complete", f"dst.hbone_addr={CART}:{SINK}")
        assert f'src.identity="{NODE_ID}"' in line
        assert "bytes_sent=32 bytes_recv=262144" in line
        assert "error=" not in line
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("settings", [{}, SMALL_WINDOW], ids=["usual windows", "1 KiB windows"])
async def test_a_pod_of_ours_calls_node(tmp_path: Path, settings: dict[str, int]) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await serve_applications(mesh, "node", nursery)
        async with a_server(mesh, tmp_path, settings=settings) as node:
            await check_all(mesh, "cart", NODE, list(APPLICATIONS), streams=14)
            requests = happened(node, "request")
            assert len(requests) == 16
            assert {request["session"] for request in requests} == {1}
            assert {request["method"] for request in requests} == {"CONNECT"}
            assert {request["peer"] for request in requests} == {CART_ID}
            assert all(request["forwarded"].startswith(f'for="{CART}:') for request in requests)
            assert all("k8s.namespace.name=shop" in request["baggage"] for request in requests)
            assert len({request["traceparent"] for request in requests}) == 16
        lines = mesh.proxies["node-a"].lines
        line = await lines.wait_for("connection complete", f"dst.addr={NODE}:15008", f":{SOURCE}")
        assert f'dst.identity="{NODE_ID}"' in line
        assert "bytes_sent=8 bytes_recv=262144" in line
        assert "error=" not in line
        nursery.cancel_scope.cancel()


async def first_bytes_then_abort(stream: trio.SocketStream) -> bool:
    """Say something, and report whether a reset is what comes back, not an end in good order."""
    async with stream:
        with trio.fail_after(5):
            await stream.send_all(b"anybody there?")
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                return True
            return False


async def test_a_stream_that_node_resets_aborts_the_application(tmp_path: Path) -> None:
    faults = {FAULTY: {"kind": "reset"}}
    async with running_mesh(tmp_path, pods()) as mesh:
        async with a_server(mesh, tmp_path, faults=faults):
            stream = await mesh.connect(mesh.pods["cart"], NODE, FAULTY)
            assert await first_bytes_then_abort(stream)
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", f":{FAULTY}")
        assert f"peer reset the stream (code {H2_INTERNAL_ERROR})" in line


async def test_a_stream_that_node_resets_as_client_aborts_the_application(tmp_path: Path) -> None:
    ends: list[str] = []
    over = trio.Event()

    async def note_the_end(stream: trio.SocketStream) -> None:
        await stream.send_all(b"welcome")
        try:
            await stream.receive_some()
            ends.append("end")
        except trio.BrokenResourceError:
            ends.append("abort")
        over.set()

    fault = {"kind": "reset"}
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, note_the_end, await mesh.listen(mesh.pods["cart"], ECHO))
        async with (
            a_client(mesh, tmp_path, f"{CART}:{ECHO}", fault=fault) as node,
            await mesh.connect(mesh.pods["node"], "127.0.0.1", doors(node)[0]),
        ):
            with trio.fail_after(5):
                await over.wait()
        assert ends == ["abort"]
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", NODE_ID)
        assert f"peer reset the stream (code {H2_INTERNAL_ERROR})" in line
        nursery.cancel_scope.cancel()


async def test_a_goaway_of_node_lets_the_stream_finish_and_moves_the_next_to_a_new_connection(
    tmp_path: Path,
) -> None:
    faults = {ECHO: {"kind": "goaway", "times": 1}}
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await serve_applications(mesh, "node", nursery)
        async with a_server(mesh, tmp_path, faults=faults) as node:
            connect = partial(mesh.connect, mesh.pods["cart"], NODE, ECHO)
            async with await connect() as running:
                await running.send_all(b"one")
                assert await peers.read_exactly(running, 3) == b"one"
                await peers.echo_and_check(connect, streams=8, size=50_000)
                await running.send_all(b"two")
                assert await peers.read_exactly(running, 3) == b"two"
                await running.send_eof()
                assert await peers.read_to_end(running) == b""
            sessions = [request["session"] for request in happened(node, "request")]
            assert sessions == [1] + [2] * 8
        assert not [line for line in mesh.proxies["node-a"].lines.all if "error=" in line]
        nursery.cancel_scope.cancel()


async def test_a_goaway_of_node_as_client_lets_its_stream_finish(tmp_path: Path) -> None:
    fault = {"kind": "goaway"}
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await serve_applications(mesh, "cart", nursery)
        async with (
            a_client(mesh, tmp_path, f"{CART}:{ECHO}", fault=fault) as node,
            await mesh.connect(mesh.pods["node"], "127.0.0.1", doors(node)[0]) as stream,
        ):
            for number in range(3):
                await stream.send_all(b"again %d" % number)
                assert await peers.read_exactly(stream, 7) == b"again %d" % number
            await stream.send_eof()
            assert await peers.read_to_end(stream) == b""
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", NODE_ID)
        assert "error=" not in line
        nursery.cancel_scope.cancel()


async def test_what_node_refuses_is_tried_once_more(tmp_path: Path) -> None:
    faults = {ECHO: {"kind": "refuse", "times": 1}, FAULTY: {"kind": "refuse"}}
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await serve_applications(mesh, "node", nursery)
        async with a_server(mesh, tmp_path, faults=faults) as node:
            connect = partial(mesh.connect, mesh.pods["cart"], NODE, ECHO)
            await peers.echo_and_check(connect, streams=1, size=1000)
            assert len(happened(node, "request")) == 2
            assert await call_refused(mesh, "cart", NODE, FAULTY)
            assert len(happened(node, "request")) == 4
        line = await mesh.proxies["node-a"].lines.wait_for("error=", f"{NODE}:{FAULTY}")
        assert f"(code {H2_REFUSED_STREAM})" in line
        nursery.cancel_scope.cancel()


ANSWERS = {
    401: "remote_denied",
    404: "remote_refused",
    503: "remote_unreachable",
}


async def test_an_answer_other_than_200_is_named_in_the_log(tmp_path: Path) -> None:
    faults = {FAULTY + status: {"kind": "status", "status": status} for status in ANSWERS}
    async with running_mesh(tmp_path, pods()) as mesh:
        async with a_server(mesh, tmp_path, faults=faults):
            for status in ANSWERS:
                assert await call_refused(mesh, "cart", NODE, FAULTY + status)
            assert await call_refused(mesh, "cart", NODE, NOBODY)  # also 503
        lines = mesh.proxies["node-a"].lines
        wanted = {FAULTY + status: (status, reason) for status, reason in ANSWERS.items()}
        wanted[NOBODY] = (503, ANSWERS[503])
        for port, (status, reason) in wanted.items():
            line = await lines.wait_for("error=", f"{NODE}:{port}")
            assert f"http status: {status}" in line
            assert f'reason="{reason}"' in line


async def test_our_refusals_reach_node_as_statuses(tmp_path: Path) -> None:
    authorities = {f"{CART}:{NOBODY}": 503, f"{NODE}:{ECHO}": 400, f"{CART}:15008": 503}
    async with running_mesh(tmp_path, pods()) as mesh:
        async with a_client(mesh, tmp_path, *authorities) as node:
            for port in doors(node):
                assert await call_refused(mesh, "node", "127.0.0.1", port)
            answers = happened(node, "response")
        assert {one["authority"]: one["status"] for one in answers} == authorities


async def test_a_connection_that_node_cuts_aborts_its_streams(tmp_path: Path) -> None:
    faults = {FAULTY: {"kind": "die"}}
    async with running_mesh(tmp_path, pods()) as mesh:
        async with a_server(mesh, tmp_path, faults=faults):
            stream = await mesh.connect(mesh.pods["cart"], NODE, FAULTY)
            assert await first_bytes_then_abort(stream)
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", f":{FAULTY}")
        assert "peer closed the connection with streams open" in line


@pytest.mark.slow
async def test_a_server_that_never_sends_settings_costs_a_bounded_time(tmp_path: Path) -> None:
    settings = {"ZTUNNEL_TLS_HANDSHAKE_TIMEOUT": "500ms"}  # added to the 10 s for a connect
    async with running_mesh(tmp_path, pods(), **settings) as mesh:
        async with a_node(mesh, tmp_path, "mute") as node:
            async with await mesh.connect(mesh.pods["cart"], NODE, ECHO) as stream:
                with trio.fail_after(15), pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            assert happened(node, "accepted")[0] == {
                "event": "accepted",
                "peer": CART_ID,
                "protocol": "h2",
            }
            await node.lines.wait_for('"gone"')
        line = await mesh.proxies["node-a"].lines.wait_for("error=", f"{NODE}:{ECHO}")
        assert "no tunnel to 10.244.2.10:15008 within 10.5s" in line
        assert 'reason="connect_timeout"' in line
