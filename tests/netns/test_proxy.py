"""The real kernel: capture, addresses, loop protection, removal and drain of enrolled pods."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.mesh import HOST, a_pod, refused, running_mesh
from ztunnel.devmesh.mesh import DevMesh, pod_uid

pytestmark = pytest.mark.netns

APP = 8080
CLIENT, SERVER, OUTSIDE = "10.244.1.10", "10.244.2.10", "203.0.113.7"


def v6(ip: str) -> str:
    return f"fd00::{ip.replace('.', ':')}"


def pods() -> list[object]:
    return [
        a_pod("client", CLIENT),
        a_pod("server", SERVER, node="node-b", services={f"shop/{HOST}": {80: APP}}),
    ]


SERVICES = [
    {
        "name": "cart",
        "namespace": "shop",
        "hostname": HOST,
        "vips": ["/10.96.0.1", "/fd00:96::1"],
        "ports": {80: APP},
    }
]


async def who_calls(stream: trio.SocketStream) -> None:
    """Tell the caller which address we see."""
    async with stream:
        await stream.send_all(stream.socket.getpeername()[0].encode())


async def ask(mesh: DevMesh, source: str, ip: str, port: int = APP) -> str:
    member = mesh.pods.get(source) or mesh.outside[source]
    async with await mesh.connect(member, ip, port) as stream:
        with trio.fail_after(10):
            return (await peers.read_to_end(stream)).decode().removeprefix("::ffff:")


@pytest.mark.parametrize("spell", [str, v6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("target", [(SERVER, APP), ("10.96.0.1", 80)], ids=["pod IP", "VIP"])
async def test_the_application_sees_the_calling_pods_address(
    tmp_path: Path, spell: Callable[[str], str], target: tuple[str, int]
) -> None:
    ip, port = target
    address = {"10.96.0.1": "fd00:96::1"}.get(ip, v6(ip)) if spell is v6 else ip
    async with running_mesh(tmp_path, pods(), SERVICES) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, who_calls, await mesh.listen(mesh.pods["server"], APP))
        assert await ask(mesh, "client", address, port) == spell(CLIENT)
        line = await mesh.proxies["node-b"].lines.wait_for("connection complete")
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
        nursery.cancel_scope.cancel()


async def test_plaintext_from_outside_the_mesh_keeps_its_source_too(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        mesh.outside["legacy"] = mesh.cluster.add_outside("legacy", OUTSIDE)
        await nursery.start(peers.serve, who_calls, await mesh.listen(mesh.pods["server"], APP))
        assert await ask(mesh, "legacy", SERVER) == OUTSIDE
        line = await mesh.proxies["node-b"].lines.wait_for("connection complete")
        assert f"src.addr={OUTSIDE}:" in line
        assert "src.identity" not in line
        nursery.cancel_scope.cancel()


async def test_what_nobody_in_the_mesh_owns_is_passed_through(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        mesh.outside["internet"] = mesh.cluster.add_outside("internet", OUTSIDE)
        listener = await mesh.listen(mesh.outside["internet"], APP)
        await nursery.start(peers.serve, who_calls, listener)
        assert await ask(mesh, "client", OUTSIDE) == CLIENT
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete")
        assert f"dst.addr={OUTSIDE}:{APP}" in line
        assert "dst.hbone_addr" not in line
        nursery.cancel_scope.cancel()


TLS_ALERT_UNEXPECTED_MESSAGE = bytes.fromhex("15 0303 0002 020a")  # what 15008 says to plaintext


async def answer_to_nonsense(mesh: DevMesh, source: str, ip: str, port: int) -> bytes:
    """What comes back before the end; nothing if it was reset, be it at once."""
    with trio.fail_after(10):
        try:
            async with await mesh.connect(mesh.pods[source], ip, port) as stream:
                await stream.send_all(b"anybody there?")
                return await peers.read_to_end(stream)
        except (trio.BrokenResourceError, ConnectionError):
            return b""


async def test_calling_a_proxys_own_ports_leads_nowhere(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        answers = {
            (ip, port): await answer_to_nonsense(mesh, "client", ip, port)
            for ip in ("127.0.0.1", "::1", CLIENT, v6(CLIENT), SERVER, v6(SERVER))
            for port in (15001, 15006, 15008)
        }
        own = {"127.0.0.1", "::1", CLIENT, v6(CLIENT)}
        for (ip, port), answer in answers.items():
            # A pod's own tunnel port is not captured, so plaintext meets TLS there.
            spoken = TLS_ALERT_UNEXPECTED_MESSAGE if port == 15008 and ip in own else b""
            assert answer == spoken, (ip, port)
        line = await mesh.proxies["node-a"].lines.wait_for("attempted recursive call to ourselves")
        assert "connection failed" in line


CONNECTS_IN_VAIN, REFUSED, HTTP = "connects in vain", "refused", "http"
NODE, POD, LOOPBACK = "the node", "its own pod", "loopback"
# dataplane.md 15.4: what comes of calling the proxy's ports, for a captured and another pod.
ABUSE = {
    ("client", NODE): {
        **dict.fromkeys((15001, 15006, 15008, 15080, 15000), CONNECTS_IN_VAIN),
        **dict.fromkeys((15020, 15021), HTTP),
    },
    ("client", POD): {
        **dict.fromkeys((15001, 15006, 15008), CONNECTS_IN_VAIN),
        **dict.fromkeys((15080, 15000, 15020, 15021), REFUSED),
    },
    ("client", LOOPBACK): {
        **dict.fromkeys((15001, 15006, 15008), CONNECTS_IN_VAIN),
        **dict.fromkeys((15080, 15000, 15020, 15021), REFUSED),
    },
    ("legacy", NODE): {
        **dict.fromkeys((15001, 15006, 15008, 15080, 15000), REFUSED),
        **dict.fromkeys((15020, 15021), HTTP),
    },
}


async def what_comes_of_it(mesh: DevMesh, caller: str, ip: str, port: int) -> str:
    """Send a request that the endpoints of the proxy would answer."""
    member = mesh.pods.get(caller) or mesh.outside[caller]
    try:
        stream = await mesh.connect(member, ip, port)
    except ConnectionRefusedError:
        return REFUSED
    except ConnectionResetError:
        return CONNECTS_IN_VAIN
    async with stream:
        try:
            with trio.fail_after(10):
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: z\r\nConnection: close\r\n\r\n")
                answer = await peers.read_to_end(stream)
        except trio.BrokenResourceError:
            return CONNECTS_IN_VAIN
    return HTTP if answer.startswith(b"HTTP/1.1 ") else CONNECTS_IN_VAIN


@pytest.mark.parametrize(("caller", "where"), ABUSE)
async def test_the_matrix_of_calls_to_the_proxys_ports(
    tmp_path: Path, caller: str, where: str
) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        mesh.outside["legacy"] = mesh.cluster.add_pod(mesh.nodes["node-a"], "legacy", "10.244.1.99")
        node = str(mesh.nodes["node-a"].addresses[0])
        ip = {NODE: node, POD: CLIENT, LOOPBACK: "127.0.0.1"}[where]
        expected = ABUSE[caller, where]
        assert {
            port: await what_comes_of_it(mesh, caller, ip, port) for port in expected
        } == expected


async def test_removing_a_pod_cuts_its_connections_and_leaves_the_others(tmp_path: Path) -> None:
    more = [*pods(), a_pod("other", "10.244.2.11", node="node-b")]
    async with running_mesh(tmp_path, more) as mesh, trio.open_nursery() as nursery:
        for name in ("server", "other"):
            await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods[name], APP))
        doomed = await mesh.connect(mesh.pods["client"], SERVER, APP)
        lives = await mesh.connect(mesh.pods["client"], "10.244.2.11", APP)
        async with doomed, lives:
            for stream in (doomed, lives):
                await stream.send_all(b"one")
                assert await peers.read_exactly(stream, 3) == b"one"
            workload = next(one for one in mesh.config.workloads if one.name == "server")
            await mesh.agents["node-b"].remove(pod_uid(workload))
            assert await refused(doomed)
            await lives.send_all(b"two")
            assert await peers.read_exactly(lives, 3) == b"two"
        nursery.cancel_scope.cancel()


async def test_a_second_sigint_does_not_wait_for_connections(tmp_path: Path) -> None:
    settings = {"CONNECTION_TERMINATION_DEADLINE": "1h"}
    async with (
        running_mesh(tmp_path, pods(), **settings) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["server"], APP))
        async with await mesh.connect(mesh.pods["client"], SERVER, APP) as stream:
            await stream.send_all(b"one")
            assert await peers.read_exactly(stream, 3) == b"one"
            proxy = mesh.proxies["node-a"]
            proxy.process.send_signal(signal.SIGINT)
            await proxy.lines.wait_for("draining")
            await stream.send_all(b"two")
            assert await peers.read_exactly(stream, 3) == b"two"
            proxy.process.send_signal(signal.SIGINT)
            with trio.fail_after(10):
                assert await proxy.process.wait() == 0
            assert await refused(stream)
        nursery.cancel_scope.cancel()


async def test_a_draining_proxy_finishes_what_is_running_and_takes_nothing_new(
    tmp_path: Path,
) -> None:
    settings = {"CONNECTION_TERMINATION_DEADLINE": "20s"}
    async with (
        running_mesh(tmp_path, pods(), **settings) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(peers.serve, peers.echo, await mesh.listen(mesh.pods["server"], APP))
        async with await mesh.connect(mesh.pods["client"], SERVER, APP) as stream:
            await stream.send_all(b"one")
            assert await peers.read_exactly(stream, 3) == b"one"
            proxy = mesh.proxies["node-a"]
            proxy.process.send_signal(signal.SIGTERM)
            await proxy.lines.wait_for("draining")
            with pytest.raises(OSError, match="refused"):
                await mesh.connect(mesh.pods["client"], SERVER, APP)
            await stream.send_all(b"two")
            assert await peers.read_exactly(stream, 3) == b"two"
            await stream.send_eof()
            assert await peers.read_to_end(stream) == b""
        with trio.fail_after(10):
            assert await proxy.process.wait() == 0
        nursery.cancel_scope.cancel()
