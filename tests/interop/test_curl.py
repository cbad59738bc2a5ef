"""libcurl as an HBONE client of ours: nghttp2 over OpenSSL, with a post-quantum key share."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import peers
from tests.support.mesh import a_pod, credentials, running_mesh
from tests.support.programs import INSTALLED, CredentialFiles, running_program
from tests.support.web import serve_http
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [pytest.mark.netns, pytest.mark.interop]

SCRIPT = Path(__file__).parents[1] / "support" / "curl_peer.py"
CART = "10.244.1.10"
WEB, NOBODY = 8080, 8090
CURL_ID = "spiffe://cluster.local/ns/shop/sa/curl"
BODY_BYTES = 262_144
POSTS, GETS = 12, 4


@pytest.fixture(scope="session")
def curl_folder() -> Path:
    """Give the folder in which pycurl is, with a libcurl of its own."""
    folder = INSTALLED / "curl"
    if not (folder / "pycurl").is_dir():
        pytest.skip("needs pycurl: run .ci/prepare.sh test")
    return folder


def pods() -> list[object]:
    return [a_pod("cart", CART), a_pod("curl", "10.244.2.10", node="node-b", nativeTunnel=True)]


async def transfers(
    mesh: DevMesh, folder: Path, library: Path, *, anonymous: bool = False, **config: Any
) -> list[dict[str, Any]]:
    """Run libcurl in its pod; give what it says about each transfer."""
    files = CredentialFiles.write(credentials(mesh, CURL_ID), folder)
    config = {
        "proxy": f"https://{CART}:15008",
        "baggage": "k8s.namespace.name=shop",
        "chain": "" if anonymous else str(files.chain),
        "key": "" if anonymous else str(files.key),
        "roots": str(files.roots),
        "size": BODY_BYTES,
        **config,
    }
    words = (sys.executable, str(SCRIPT), json.dumps(config))
    environment = {"PYTHONPATH": str(library)}
    async with running_program(mesh.pods["curl"], *words, environment=environment) as program:
        *results, _version = map(json.loads, await program.finished())
        return results


async def test_libcurl_posts_and_gets_through_tunnels_to_a_pod_of_ours(
    tmp_path: Path, curl_folder: Path
) -> None:
    url = f"http://{CART}:{WEB}"
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, serve_http, await mesh.listen(mesh.pods["cart"], WEB))
        results = await transfers(
            mesh,
            tmp_path,
            curl_folder,
            posts=[[f"{url}/{seed}", seed] for seed in range(POSTS)],
            gets=[f"{url}/{size}" for size in range(100_000, 100_000 + GETS)],
        )
        outcomes = {(one["error"], one["connect_status"], one["status"]) for one in results}
        assert outcomes == {("", 200, 200)}
        wanted = [peers.random_bytes(BODY_BYTES, seed=seed) for seed in range(POSTS)]
        wanted += [peers.random_bytes(size, seed=size) for size in range(100_000, 100_000 + GETS)]
        assert [one["sha256"] for one in results] == [
            hashlib.sha256(body).hexdigest() for body in wanted
        ]
        # It multiplexes nothing: every tunnel is a connection and a handshake of its own.
        assert {one["connections"] for one in results} == {1}
        lines = mesh.proxies["node-a"].lines
        line = await lines.wait_for("connection complete", CURL_ID, "bytes_sent=100043 ")
        assert f"dst.hbone_addr={CART}:{WEB}" in line
        # When it is done it closes the connection, and leaves its stream as it is.
        assert "peer closed the connection with streams open" in line
        nursery.cancel_scope.cancel()


async def test_libcurl_is_told_why_a_tunnel_is_refused(tmp_path: Path, curl_folder: Path) -> None:
    wanted = {
        f"http://{CART}:{NOBODY}/": 503,
        f"http://{CART}:15008/": 503,
        f"http://10.244.9.9:{WEB}/": 400,
        f"http://nobody.example:{WEB}/": 503,
    }
    async with running_mesh(tmp_path, pods()) as mesh:
        results = await transfers(mesh, tmp_path, curl_folder, gets=list(wanted))
        assert {one["url"]: one["connect_status"] for one in results} == wanted
        line = await mesh.proxies["node-a"].lines.wait_for("ip mismatch")
        assert "10.244.9.9" in line


async def test_libcurl_does_not_take_the_end_of_a_stream_for_the_end_of_a_body(
    tmp_path: Path, curl_folder: Path
) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        await nursery.start(peers.serve, serve_http, await mesh.listen(mesh.pods["cart"], WEB))
        url = f"http://{CART}:{WEB}/until-close/1000"
        [result] = await transfers(mesh, tmp_path, curl_folder, gets=[url], milliseconds=2000)
        assert result["error"].startswith("28 ")  # it has all, and waits for more
        assert result["sha256"] == hashlib.sha256(peers.random_bytes(1000, seed=1000)).hexdigest()
        line = await mesh.proxies["node-a"].lines.wait_for("connection complete", CURL_ID)
        assert "peer closed the connection with streams open" in line
        nursery.cancel_scope.cancel()


async def test_libcurl_without_a_certificate_gets_nowhere(
    tmp_path: Path, curl_folder: Path
) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        url = f"http://{CART}:{WEB}/1"
        [result] = await transfers(mesh, tmp_path, curl_folder, gets=[url], anonymous=True)
        assert result["connect_status"] == 0
        assert "certificate required" in result["error"]
        line = await mesh.proxies["node-a"].lines.wait_for('reason="tls_failure"')
        assert "src.addr=10.244.2.10:" in line
