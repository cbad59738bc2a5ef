"""What our proxy says of connections, in its log, metrics and dump, beside what the reference says.

Runs when ZTUNNEL_REFERENCE is the path of the reference's ztunnel, which no registry has. The same
calls are made in a mesh of theirs and in one of ours, of two nodes each.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from tests.support import peers
from tests.support.reference_mesh import APP, CART_B, LEDGER, MANIFESTS, VIP, get, reference_mesh
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    pytest.mark.reference("ZTUNNEL_REFERENCE"),
]

NODES = ("node-a", "node-b")
LEGACY, INTERNET = "10.244.1.200", "203.0.113.10"
CALLS = (
    ("web", CART_B, APP),
    ("web", VIP, 80),
    ("web", VIP, 81),
    ("web", LEDGER, APP),
    ("cart-a", LEDGER, APP),
    ("legacy", CART_B, APP),
    ("legacy", LEDGER, APP),
    ("web", INTERNET, APP),
    ("web", INTERNET, 9999),
    ("web", CART_B, 9999),
    ("web", CART_B, 15001),
    ("web", CART_B, 15008),
)
OURS_ONLY = re.compile(r' (reason|policy)="[^"]*"')
PASSING = re.compile(r'(?<=src.addr=)\S+| duration="\d+ms"')
# Of the process and its parts, and not of the mesh.
THEIRS_ONLY = "tokio_"
OF_THE_PROCESS = ("process_", "istio_build", "istio_xds")
FAMILIES = {f"istio_tcp_connections_{one}_total" for one in ("opened", "closed", "failed")} | {
    "istio_tcp_received_bytes_total",
    "istio_tcp_sent_bytes_total",
    "istio_tcp_sockets_open",
    "workload_manager_active_proxy_count",
}
SECTIONS = ("policies", "services", "stagedServices", "staticConfig", "workloads")


@dataclass
class Said:
    """What both proxies of a mesh say."""

    log: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    dumps: dict[str, Any] = field(default_factory=dict)


async def said(folder: Path, *theirs: str) -> Said:
    """Make the calls, one after the other, and collect it."""
    manifests = folder / "mesh.yaml"
    # One server for the service: which of two is taken would be chance.
    text = MANIFESTS.read_text()
    head, _, rest = text.partition("name: cart-a")
    manifests.write_text(f"{head}name: cart-a{rest.replace('app: cart', 'app: other', 1)}")
    found = Said()
    async with (
        reference_mesh(*theirs, manifests=manifests) as mesh,
        trio.open_nursery() as nursery,
    ):
        mesh.outside["legacy"] = mesh.cluster.add_pod(mesh.nodes["node-a"], "legacy", LEGACY)
        internet = mesh.outside["internet"] = mesh.cluster.add_outside("internet", INTERNET)
        await nursery.start(peers.serve, peers.echo, await mesh.listen(internet, APP))
        for call in CALLS:
            found.log += [f"{call}:", *await lines_of(mesh, *call)]
        for name in NODES:
            node = mesh.nodes[name]
            found.metrics[name] = samples((await get(node, 15020, "/metrics")).decode())
            found.dumps[name] = json.loads(await get(node, 15000, "/config_dump"))
        nursery.cancel_scope.cancel()
    return found


async def lines_of(mesh: DevMesh, name: str, ip: str, port: int) -> list[str]:
    """Make a call; give the access log's lines about it, as far as two runs can be alike."""
    marks = {node: len(mesh.proxies[node].lines.all) for node in NODES}
    with suppress(OSError, trio.BrokenResourceError):
        member = mesh.pods.get(name) or mesh.outside[name]
        async with await mesh.connect(member, ip, port) as stream:
            await stream.send_all(b"hello world")
            await stream.send_eof()
            await peers.read_to_end(stream)
    await trio.sleep(0.3)  # for the lines of both; there may be one or two
    return sorted(
        f"{node} {PASSING.sub('', OURS_ONLY.sub('', line.partition(chr(9))[2]))}"
        for node in NODES
        for line in mesh.proxies[node].lines.all[marks[node] :]
        if "\taccess\t" in line
    )


def samples(text: str) -> dict[str, float]:
    """Read every sample, by its name and labels."""
    return {
        f"{sample.name} {sorted(sample.labels.items())}": sample.value
        for family in parse(text)
        for sample in family.samples
    }


async def test_log_metrics_and_dump_say_what_the_reference_says(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    theirs = await said(tmp_path_factory.mktemp("t"), *NODES)
    ours = await said(tmp_path_factory.mktemp("o"))
    assert ours.log == theirs.log
    for name in NODES:
        wanted = {
            key: value
            for key, value in theirs.metrics[name].items()
            if not key.startswith((THEIRS_ONLY, *OF_THE_PROCESS))
        }
        assert {key.partition(" ")[0] for key in wanted} >= FAMILIES
        found = {key: ours.metrics[name].get(key) for key in wanted}
        assert {
            key: (found[key], value) for key, value in wanted.items() if found[key] != value
        } == {}
        for key in SECTIONS:
            assert ours.dumps[name][key] == theirs.dumps[name][key], key
