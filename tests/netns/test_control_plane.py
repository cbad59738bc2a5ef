"""Real node proxies while their control plane is away, and after it has come back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import trio
import yaml

from tests.support import peers
from ztunnel.devmesh.control_plane import ControlPlane
from ztunnel.devmesh.kube_mesh import kube_mesh
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [pytest.mark.netns, pytest.mark.timeout(60)]

APP = 8080
VIP, CART_A, LEDGER = "10.96.0.10", "10.244.1.11", "10.244.2.11"
MANIFESTS = Path(str(files("ztunnel.devmesh").joinpath("demo.yaml")))
SETTINGS = {"ISTIO_META_DNS_CAPTURE": "false"}
TYPES = 2  # addresses and policies, each acknowledged
AWAY_SECONDS = 3.0


@asynccontextmanager
async def scene() -> AsyncIterator[tuple[DevMesh, ControlPlane]]:
    """A mesh in which each pod says its name to whoever asks."""
    async with (
        kube_mesh(MANIFESTS, prefix=f"zt{os.getpid()}", settings=SETTINGS) as (mesh, plane),
        trio.open_nursery() as nursery,
    ):
        for name, pod in mesh.pods.items():
            await nursery.start(peers.serve, answering(name), await mesh.listen(pod, APP))
        yield mesh, plane
        nursery.cancel_scope.cancel()


def answering(name: str) -> peers.Handler:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                await stream.send_all(f"{name}\n".encode())

    return answer


async def ask(mesh: DevMesh, ip: str, port: int) -> str:
    """Open a connection from web and return who answers, "" if nobody does."""
    with trio.fail_after(10):
        try:
            async with await mesh.connect(mesh.pods["web"], ip, port) as stream:
                await stream.send_all(b"?")
                return (await stream.receive_some()).decode().strip()
        except (trio.BrokenResourceError, ConnectionResetError):  # perhaps while it connects
            return ""


async def stop(plane: ControlPlane) -> None:
    await trio.to_thread.run_sync(plane.stop)


async def start_again(mesh: DevMesh, plane: ControlPlane) -> None:
    """Bring it back, and wait until both proxies have taken in what it says."""
    wanted = plane.counts.acks + TYPES * len(mesh.proxies)
    plane.start(f"127.0.0.1:{plane.port}")
    assert await trio.to_thread.run_sync(
        lambda: plane.wait_for(lambda: plane.counts.acks >= wanted, seconds=30)
    )


class Traffic:
    """Connections opened one after the other, and one that stays; what became of them."""

    def __init__(self, mesh: DevMesh) -> None:
        self._mesh = mesh
        self.answers: list[str] = []
        self.lasting: list[str] = []

    async def open(self, ip: str, port: int) -> None:
        while True:
            self.answers.append(await ask(self._mesh, ip, port))
            await trio.sleep(0.01)

    async def last(self, ip: str, port: int) -> None:
        async with await self._mesh.connect(self._mesh.pods["web"], ip, port) as stream:
            while True:
                await stream.send_all(b"?")
                self.lasting.append((await stream.receive_some()).decode().strip())
                await trio.sleep(0.05)


async def test_no_connection_fails_while_the_control_plane_is_away_and_comes_back() -> None:
    async with scene() as (mesh, plane), trio.open_nursery() as nursery:
        assert await ask(mesh, VIP, 80) in {"cart-a", "cart-b"}
        traffic = Traffic(mesh)
        for target in ((VIP, 80), (CART_A, APP)):
            nursery.start_soon(traffic.open, *target)
            nursery.start_soon(traffic.last, *target)
        await trio.sleep(0.5)
        await stop(plane)
        gone = partial(plane.wait_for, lambda: not plane.open_streams, seconds=10)
        assert await trio.to_thread.run_sync(gone)
        before = len(traffic.answers)
        await trio.sleep(AWAY_SECONDS)
        while_away = len(traffic.answers) - before
        await start_again(mesh, plane)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    assert while_away > 20
    assert len(traffic.answers) > before + while_away
    assert {*traffic.answers, *traffic.lasting} == {"cart-a", "cart-b"}


async def test_what_changed_while_it_was_away_holds_once_it_is_back() -> None:
    async with scene() as (mesh, plane):
        assert {await ask(mesh, VIP, 80) for _ in range(40)} == {"cart-a", "cart-b"}
        assert await ask(mesh, LEDGER, APP) == ""
        await stop(plane)
        manifests = list(yaml.safe_load_all(mesh.path.read_text()))
        kept = [
            one
            for one in manifests
            if (one["kind"], one["metadata"]["name"])
            not in {("Pod", "cart-b"), ("AuthorizationPolicy", "no-web")}
        ]
        assert len(kept) == len(manifests) - 2
        mesh.path.write_text(yaml.safe_dump_all(kept))
        # What was true stays true as long as nobody says otherwise.
        assert await ask(mesh, LEDGER, APP) == ""
        await trio.sleep(1)  # more than the control plane takes to notice its file
        await start_again(mesh, plane)
        assert {await ask(mesh, VIP, 80) for _ in range(40)} == {"cart-a"}
        assert await ask(mesh, LEDGER, APP) == "ledger"
        assert plane.counts.refusals == []
