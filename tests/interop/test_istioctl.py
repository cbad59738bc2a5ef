"""`istioctl ztunnel-config` reads what our proxy dumps.

Runs when ISTIOCTL is the path of that program, which no package of ours brings.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.support import peers
from tests.support.reference_mesh import APP, CART_B, get, reference_mesh

pytestmark = [pytest.mark.netns, pytest.mark.interop, pytest.mark.reference("ISTIOCTL")]

# What to ask for, and words that one line of the answer begins with, in this order.
ANSWERS = [
    ("workload", "shop cart-b 10.244.2.10,fd00:10:244:2::10 node-b None HBONE"),
    ("service", "shop cart 10.96.0.10,fd00:10:96::10 None 2/2"),
    ("policy", "bank no-web Deny WorkloadSelector"),
    ("certificate", "spiffe://cluster.local/ns/shop/sa/web Leaf Available true"),
    ("connections", "web.shop Outbound web.shop:"),
    ("all", "bank no-web Deny WorkloadSelector"),
]


async def istioctl(*words: str) -> str:
    with trio.fail_after(30):
        done = await trio.run_process(
            [os.environ["ISTIOCTL"], "ztunnel-config", *words], capture_stdout=True
        )
    return done.stdout.decode()


async def test_every_view_shows_what_the_dump_says(tmp_path: Path) -> None:
    file = tmp_path / "dump.json"
    async with (
        reference_mesh() as mesh,
        await mesh.connect(mesh.pods["web"], CART_B, APP) as stream,
    ):
        await stream.send_all(b"open")
        assert await peers.read_exactly(stream, 4) == b"open"
        file.write_bytes(await get(mesh.nodes["node-a"], 15000, "/config_dump"))
    for view, wanted in ANSWERS:
        lines = [
            " ".join(line.split())
            for line in (await istioctl(view, "--file", str(file))).splitlines()
        ]
        assert [line for line in lines if line.startswith(wanted)], (view, lines)
