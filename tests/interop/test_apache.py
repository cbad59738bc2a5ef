"""Apache httpd (mod_http2) as the HBONE server that a pod of ours calls."""

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
    pytest.mark.requires_program("apache2"),
]

APACHE = "10.244.2.10"
ECHO, SINK, SOURCE, NOBODY = 8080, 8081, 8082, 8090
APPLICATIONS = {ECHO: peers.echo, SINK: peers.sink, SOURCE: peers.source}
APACHE_ID = "spiffe://cluster.local/ns/shop/sa/apache"
DOWNLOAD_BYTES = 262_144
NO_END_SECONDS = 0.3
READY = "resuming normal operations"
CONFIG = """
ServerName hbone
ServerRoot "{folder}"
PidFile "{folder}/apache.pid"
Mutex pthread default
ErrorLog /dev/stderr
LogLevel notice
User www-data
Group www-data
StartServers 1
ThreadsPerChild 32
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule ssl_module {modules}/mod_ssl.so
LoadModule http2_module {modules}/mod_http2.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_connect_module {modules}/mod_proxy_connect.so
LogFormat "request method=%m authority=%{{Host}}i status=%>s verified=%{{SSL_CLIENT_VERIFY}}x" hbone
CustomLog /dev/stdout hbone
Listen 0.0.0.0:15008
SSLEngine on
SSLProtocol TLSv1.3
SSLCertificateFile "{files.chain}"
SSLCertificateKeyFile "{files.key}"
SSLCACertificateFile "{files.roots}"
SSLVerifyClient require
SSLVerifyDepth 3
Protocols h2
H2ProxyRequests on
ProxyRequests on
AllowCONNECT 1-65535
<Proxy "*">
  Require all granted
</Proxy>
"""
MODULES = "/usr/lib/apache2/modules"


def pods() -> list[object]:
    return [
        a_pod("cart", "10.244.1.10"),
        a_pod("apache", APACHE, node="node-b", nativeTunnel=True),
    ]


@asynccontextmanager
async def running_apache(mesh: DevMesh, folder: Path) -> AsyncIterator[Program]:
    files = CredentialFiles.write(credentials(mesh, APACHE_ID), folder)
    config = folder / "apache.conf"
    config.write_text(CONFIG.format(folder=folder, files=files, modules=MODULES))
    words = ("apache2", "-f", str(config), "-DFOREGROUND")
    async with running_program(mesh.pods["apache"], *words, ready=READY) as apache:
        yield apache


async def download_and_finish_first(connect: peers.Connect) -> None:
    """Take all that is asked for and finish; Apache passes on no end before it has seen one."""
    async with await connect() as stream:
        await stream.send_all(peers.SOURCE_REQUEST.pack(DOWNLOAD_BYTES))
        received = await peers.read_exactly(stream, DOWNLOAD_BYTES)
        assert received == peers.random_bytes(DOWNLOAD_BYTES, seed=DOWNLOAD_BYTES)
        with trio.move_on_after(NO_END_SECONDS) as patience:
            await stream.receive_some()
        assert patience.cancelled_caught, "Apache has learnt to end first; say so in the document"
        await stream.send_eof()
        assert await peers.read_to_end(stream) == b""


async def test_a_pod_of_ours_calls_apache(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh, trio.open_nursery() as nursery:
        for port, application in APPLICATIONS.items():
            listener = await mesh.listen(mesh.pods["apache"], port)
            await nursery.start(peers.serve, application, listener)
        async with running_apache(mesh, tmp_path) as apache:
            echo, sink, source = (
                partial(mesh.connect, mesh.pods["cart"], APACHE, port) for port in APPLICATIONS
            )
            with trio.fail_after(30):
                async with trio.open_nursery() as calls:
                    calls.start_soon(partial(peers.echo_and_check, echo, streams=14, size=100_000))
                    calls.start_soon(peers.upload_and_check, sink)
                    calls.start_soon(download_and_finish_first, source)
            said = f"request method=CONNECT authority={APACHE}:{SINK} status=200 verified=SUCCESS"
            await apache.lines.wait_for(said)
        lines = mesh.proxies["node-a"].lines
        line = await lines.wait_for("connection complete", f"dst.hbone_addr={APACHE}:{SOURCE}")
        assert f'dst.identity="{APACHE_ID}"' in line
        assert f"bytes_sent=8 bytes_recv={DOWNLOAD_BYTES}" in line
        assert not [line for line in lines.all if "error=" in line]
        nursery.cancel_scope.cancel()


async def test_what_apache_cannot_reach_is_refused_with_503(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, pods()) as mesh:
        async with running_apache(mesh, tmp_path) as apache:
            assert await call_refused(mesh, "cart", APACHE, NOBODY)
            await apache.lines.wait_for(f"authority={APACHE}:{NOBODY} status=503")
        line = await mesh.proxies["node-a"].lines.wait_for("error=", f"{APACHE}:{NOBODY}")
        assert "http status: 503" in line
