"""HAProxy as a hop between two of our proxies: it stands where a waypoint stands, and forwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.mesh import a_pod, call_refused, credentials, running_mesh
from tests.support.programs import CredentialFiles, Program, running_program
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    pytest.mark.requires_program("haproxy"),
]

WEB, CART, HOP = "10.244.1.10", "10.244.2.10", "10.244.3.10"
ECHO, SINK, SOURCE, NOBODY = 8080, 8081, 8082, 8090
APPLICATIONS = {ECHO: peers.echo, SINK: peers.sink, SOURCE: peers.source}
HOP_ID = "spiffe://cluster.local/ns/shop/sa/hop"
DOWNLOAD_BYTES = 262_144
READY = "Loading success"
CONFIG = """
global
  maxconn 200
  log stdout format raw local0
defaults
  mode http
  log global
  log-format "request method=%HM authority=%HU status=%ST"
  timeout connect 2s
  timeout client 30s
  timeout server 30s
  timeout tunnel 1m
frontend hbone
  bind 0.0.0.0:15008 {tls} ssl-min-ver TLSv1.3
  default_backend cart
backend cart
  server cart {cart}:15008 {tls} proto h2
"""


def pods() -> list[object]:
    waypoint = {"destination": f"/{HOP}", "hboneMtlsPort": 15008}
    return [
        a_pod("web", WEB),
        a_pod("cart", CART, node="node-b", waypoint=waypoint),
        a_pod("hop", HOP, node="node-b", nativeTunnel=True),
    ]


@asynccontextmanager
async def running_haproxy(mesh: DevMesh, folder: Path) -> AsyncIterator[Program]:
    files = CredentialFiles.write(credentials(mesh, HOP_ID), folder)
    config = folder / "haproxy.cfg"
    tls = f"ssl crt {files.both} ca-file {files.roots} verify required alpn h2"
    config.write_text(CONFIG.format(tls=tls, cart=CART))
    # A master process, because it says when its worker is ready.
    words = ("haproxy", "-W", "-f", str(config))
    async with running_program(mesh.pods["hop"], *words, ready=READY) as haproxy:
        yield haproxy


async def download_and_leave(connect: peers.Connect) -> None:
    """Take all that is asked for, and its end, which comes first."""
    async with await connect() as stream:
        await stream.send_all(peers.SOURCE_REQUEST.pack(DOWNLOAD_BYTES))
        received = await peers.read_to_end(stream)
        assert received == peers.random_bytes(DOWNLOAD_BYTES, seed=DOWNLOAD_BYTES)


async def test_our_client_and_our_server_meet_through_haproxy(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        for port, application in APPLICATIONS.items():
            listener = await mesh.listen(mesh.pods["cart"], port)
            await nursery.start(peers.serve, application, listener)
        async with running_haproxy(mesh, tmp_path) as haproxy:
            echo, sink, source = (
                partial(mesh.connect, mesh.pods["web"], CART, port) for port in APPLICATIONS
            )
            with trio.fail_after(30):
                async with trio.open_nursery() as calls:
                    calls.start_soon(partial(peers.echo_and_check, echo, streams=14, size=100_000))
                    calls.start_soon(peers.upload_and_check, sink)
                    calls.start_soon(download_and_leave, source)
            said = f"request method=CONNECT authority={CART}:{SINK} status=200"
            await haproxy.lines.wait_for(said)
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", f"{CART}:{SINK}")
        assert f"dst.addr={HOP}:15008" in line
        assert f'dst.identity="{HOP_ID}"' in line
        assert "bytes_sent=262144 bytes_recv=32" in line
        line = await mesh.proxies["node-b"].lines.wait_for("connection complete", f"{CART}:{SINK}")
        assert f'src.identity="{HOP_ID}"' in line
        assert "bytes_sent=32 bytes_recv=262144" in line
        everything = [line for proxy in mesh.proxies.values() for line in proxy.lines.all]
        failed = [line for line in everything if "error=" in line]
        # Once the server has ended, HAProxy may cut what is left of the stream on either leg.
        assert all(f"{CART}:{SOURCE}" in line for line in failed), failed
        nursery.cancel_scope.cancel()


async def test_a_refusal_of_our_server_comes_through_haproxy(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        async with running_haproxy(mesh, tmp_path):
            assert await call_refused(mesh, "web", CART, NOBODY)
        line = await mesh.proxies["node-b"].lines.wait_for("connection failed", f"{CART}:{NOBODY}")
        assert 'reason="unreachable"' in line
        line = await mesh.proxies["node-a"].lines.wait_for("error=", f"{CART}:{NOBODY}")
        assert "http status: 503" in line
