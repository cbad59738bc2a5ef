"""Names in a whole mesh: real node proxies, a real resolver, programs that look up and connect."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.dns import printed, running, with_resolv_conf
from tests.support.dns_scene import DNSMASQ, short
from tests.support.mesh import HOST, a_pod, running_mesh
from ztunnel.devmesh.mesh import DevMesh

pytestmark = [
    pytest.mark.netns,
    pytest.mark.requires_program("dig", "dnsmasq", "unshare"),
]

APP = 8080
CLIENT, SERVER, RESOLVER, OUTSIDE = "10.244.1.10", "10.244.2.10", "203.0.113.53", "203.0.113.7"
SET = "set.shop.svc.cluster.local"
PODS = [
    a_pod("client", CLIENT),
    a_pod(
        "set-0",
        SERVER,
        node="node-b",
        services={f"shop/{HOST}": {80: APP}, f"shop/{SET}": {80: APP}},
    ),
]
SERVICES = [
    {
        "name": "cart",
        "namespace": "shop",
        "hostname": HOST,
        "vips": ["/10.96.0.1", "/fd00:96::1"],
        "ports": {80: APP},
    },
    {"name": "set", "namespace": "shop", "hostname": SET, "vips": [], "ports": {80: APP}},
]
# Connects to each name as any program does, and prints what it reads there.
CALL = """
import socket, sys
for target in sys.argv[1:]:
    name, _, port = target.rpartition(":")
    with socket.create_connection((name, int(port)), 10) as sock, sock.makefile() as stream:
        print(name, stream.read())
"""


async def who_calls(stream: trio.SocketStream) -> None:
    """Tell the caller which address we see."""
    async with stream:
        await stream.send_all(stream.socket.getpeername()[0].removeprefix("::ffff:").encode())


async def metrics(mesh: DevMesh, node: str) -> str:
    """Scrape the proxy of a node from inside that node."""
    url = "http://127.0.0.1:15020/metrics"
    script = f"import urllib.request as u; print(u.urlopen({url!r}).read().decode())"
    return await printed(mesh.nodes[node], sys.executable, "-I", "-c", script)


async def test_programs_reach_by_name_what_is_in_the_mesh_and_what_is_not(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    search = "search shop.svc.cluster.local svc.cluster.local cluster.local"
    conf.write_text(f"nameserver {RESOLVER}\n{search}\noptions ndots:5\n")
    async with running_mesh(tmp_path, PODS, SERVICES) as mesh, trio.open_nursery() as nursery:
        resolver = mesh.cluster.add_outside("resolver", RESOLVER)
        legacy = mesh.cluster.add_outside("legacy", OUTSIDE)
        words = (*DNSMASQ, "--log-facility=/dev/null", f"--host-record=legacy.example,{OUTSIDE}")
        with running(resolver, *words):
            for member in (mesh.pods["set-0"], legacy):
                await nursery.start(peers.serve, who_calls, await mesh.listen(member, APP))
            targets = ["cart:80", f"set-0.set:{APP}", f"legacy.example:{APP}"]
            command = with_resolv_conf(conf, sys.executable, "-I", "-S", "-c", CALL, *targets)
            text = await printed(mesh.pods["client"], *command)
            names = [target.rpartition(":")[0] for target in targets]
            found = [line.split() for line in text.splitlines()]
            assert [name for name, _ in found] == names
            seen_as = {CLIENT, f"fd00::{CLIENT.replace('.', ':')}"}
            assert {address for _, address in found} <= seen_as
            lines = mesh.proxies["node-b"].lines
            line = await lines.wait_for("connection complete")
            assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line
            asked = (mesh.pods["client"], f"@{RESOLVER}", f"_80._tcp.{SET}", "SRV")
            assert await short(*asked) == sorted(["0", "100", str(APP), f"set-0.{SET}."])
            told = await metrics(mesh, "node-a")
        nursery.cancel_scope.cancel()
    counted = {
        family: [line for line in told.splitlines() if line.startswith(family) and "{" in line]
        for family in ("istio_dns_requests_total", "istio_dns_upstream_requests_total")
    }
    for family, lines_of in counted.items():
        assert any('request_query_type="a"' in line for line in lines_of), family
    assert 'ztunnel_dns_answers_total{source="mesh",code="noerror"}' in told
