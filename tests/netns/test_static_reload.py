"""The file of the static configuration, changed while the proxy runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import yaml

from tests.support import peers
from tests.support.mesh import a_pod, call_refused, running_mesh

pytestmark = pytest.mark.netns

APP = 8080
SERVER = "10.244.2.10"
SECONDS = 15


async def test_a_policy_that_comes_into_the_file_is_enforced_and_a_broken_file_changes_nothing(
    tmp_path: Path,
) -> None:
    pods = [a_pod("client", "10.244.1.10"), a_pod("server", SERVER, node="node-b")]
    async with running_mesh(tmp_path, pods) as mesh, trio.open_nursery() as nursery:
        server = mesh.pods["server"]
        await nursery.start(peers.serve, peers.echo, await mesh.listen(server, APP))
        path = tmp_path / "mesh.yaml"
        document = yaml.safe_load(path.read_text())
        async with await mesh.connect(mesh.pods["client"], SERVER, APP) as stream:
            await stream.send_all(b"ping")
            assert await peers.read_exactly(stream, 4) == b"ping"
            lines = mesh.proxies["node-b"].lines

            path.write_text(path.read_text() + "policies: [\n")
            await lines.wait_for("mesh.yaml", "error", seconds=SECONDS)
            await stream.send_all(b"ping")
            assert await peers.read_exactly(stream, 4) == b"ping"

            document["policies"] = [
                {
                    "name": "no-client",
                    "namespace": "shop",
                    "scope": "Namespace",
                    "action": "Deny",
                    "dryRun": False,
                }
                | {"rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/client"}]}]]]}
            ]
            path.write_text(yaml.safe_dump(document))
            with trio.fail_after(SECONDS), pytest.raises((trio.BrokenResourceError, EOFError)):
                await peers.read_exactly(stream, 1)
        assert await call_refused(mesh, "client", SERVER, APP)
        nursery.cancel_scope.cancel()
