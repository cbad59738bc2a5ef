"""What operators do with a running node proxy: look in, scrape it through the mesh, end it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h2.events
import pytest
import trio
import yaml

from tests.support.builders import an_identity
from tests.support.operators import connect, http
from tests.support.scripted import a_scripted_client
from ztunnel.devmesh.cluster import Cluster, Node
from ztunnel.devmesh.node_proxy import NodeProxy, running_node_proxy
from ztunnel.identity.dev_ca import DevelopmentCa

pytestmark = pytest.mark.netns

SELF = {
    "POD_NAME": "ztunnel-abc",
    "POD_NAMESPACE": "istio-system",
    "SERVICE_ACCOUNT": "ztunnel",
}


@asynccontextmanager
async def a_node_proxy(
    folder: Path, **settings: str
) -> AsyncIterator[tuple[NodeProxy, Node, DevelopmentCa]]:
    """A node with its proxy, no pods, and no node agent yet."""
    authority = DevelopmentCa.create()
    with Cluster(f"zo{os.getpid()}") as cluster:
        node = cluster.add_node("node-a")
        path = folder / "mesh.yaml"
        ourselves = {
            "name": SELF["POD_NAME"],
            "namespace": SELF["POD_NAMESPACE"],
            "serviceAccount": SELF["SERVICE_ACCOUNT"],
            "trustDomain": "cluster.local",
            "node": "node-a",
            "workloadIps": [str(node.addresses[0])],
            "services": {},
        }
        path.write_text(yaml.safe_dump({"workloads": [ourselves]}))
        async with running_node_proxy(
            node,
            config_path=path,
            agent_socket=folder / "agent.sock",
            authority=authority,
            settings=settings,
        ) as proxy:
            await proxy.lines.wait_for("static configuration loaded", seconds=20)
            yield proxy, node, authority


async def test_readiness_waits_for_the_node_agent_and_says_so(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path) as (_, node, _):
        status, body = await http(node, 15021, "GET /healthz/ready")
        assert status == "HTTP/1.1 500 Internal Server Error"
        assert body == b"not ready, pending: workload proxy manager\n"


async def test_the_dump_shows_what_is_known_and_no_key(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path) as (_, node, _):
        status, body = await http(node, 15000, "GET /config_dump")
        assert status == "HTTP/1.1 200 OK"
        text = b"".join(body.split(b"\r\n")[1::2])  # chunked
        dump = json.loads(text)
        assert [one["name"] for one in dump["workloads"]] == ["ztunnel-abc"]
        assert dump["config"]["proxyMode"] == "Shared"
        assert b"PRIVATE KEY" not in text


async def test_the_log_level_can_be_changed_while_it_runs(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path) as (_, node, _):
        status, body = await http(node, 15000, "POST /logging?level=access=debug")
        assert (status, b"current log level is access=debug,info" in body) == (
            "HTTP/1.1 200 OK",
            True,
        )


async def test_quitquitquit_ends_it_in_good_order(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path) as (proxy, node, _):
        status, body = await http(node, 15000, "POST /quitquitquit")
        assert (status, body) == ("HTTP/1.1 200 OK", b"shutdown now\n")
        with trio.fail_after(10):
            assert await proxy.process.wait() == 0


async def test_sighup_changes_nothing(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path) as (proxy, node, _):
        proxy.process.send_signal(signal.SIGHUP)
        await proxy.lines.wait_for("SIGHUP ignored")
        status, _ = await http(node, 15021, "GET /healthz/ready")
        assert status == "HTTP/1.1 500 Internal Server Error"


async def test_the_mesh_scrapes_the_proxy_through_a_tunnel(tmp_path: Path) -> None:
    async with a_node_proxy(tmp_path, **SELF) as (proxy, node, authority):
        await proxy.lines.wait_for("listener established", "15008")
        address = str(node.addresses[0])
        scraper = authority.issue(an_identity("prometheus", "monitoring"))
        stream = await connect(node, 15008, address)
        async with a_scripted_client(stream, scraper) as client:
            tunnel = await client.request(f"{address}:15020")
            assert await client.status(tunnel) == 200
            client.h2.send_data(
                tunnel, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", end_stream=True
            )
            await client.send()
            page = b""
            while b"# EOF" not in page:
                page += (await client.until(h2.events.DataReceived)).data
            assert b'istio_build{component="ztunnel"' in page
        line = await proxy.lines.wait_for("connection complete", 'direction="inbound"')
        assert 'src.identity="spiffe://cluster.local/ns/monitoring/sa/prometheus"' in line
