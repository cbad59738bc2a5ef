"""Tens of thousands of queries from one pod: all are answered, and nothing of them stays."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.dns import Served, printed, until
from tests.support.dns_scene import CART, RESOLVER, Scene, a_scene, serving
from tests.support.namespaces import needs_root
from tests.support.tunnels import open_descriptors
from ztunnel.dns.ports import PORTS_PER_SERVER

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.slow,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

LOAD = Path(__file__).parents[2] / "perf" / "dns_load.py"
QUERIES = 12_000
OBJECTS = 2000  # may stay of so many queries: what was remembered is replaced by what is


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        yield scene


async def flood(scene: Scene, *words: str) -> None:
    """Ask `QUERIES` times; each must be answered, and rightly."""
    command = (sys.executable, "-P", str(LOAD), "--server", RESOLVER, "--queries", str(QUERIES))
    found = json.loads(await printed(scene.pod, *command, *words))
    assert (found["answers"], found["lost"], found["wrong"]) == (QUERIES, 0, 0)


async def at_rest(served: Served) -> tuple[int, int]:
    """Wait until no port is open for queries to come; count descriptors and tasks."""
    upstream = served.server.resolver.upstream
    await until(lambda: upstream.ports_kept == 0)
    return open_descriptors(), trio.lowlevel.current_statistics().tasks_living


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("freshness", [(), ("--fresh",)], ids=["the same", "each new"])
@pytest.mark.parametrize("name", [CART, "example.org"], ids=["mesh", "forwarded"])
async def test_a_flood_leaves_nothing_behind(
    scene: Scene, name: str, freshness: tuple[str, ...]
) -> None:
    async with serving(scene) as served:
        resolver = served.server.resolver
        before = await at_rest(served)
        await flood(scene, name, *freshness)
        kept = objects()
        await flood(scene, name, *freshness)
        assert resolver.upstream.queries == 0
        assert not served.server._under_way
        # A few ports are kept for queries to come; not one per query, nor for long.
        assert resolver.upstream.ports_kept <= PORTS_PER_SERVER
        assert await at_rest(served) == before
        assert objects() <= kept + OBJECTS
        assert served.counted("dns_requests", "a", "udp", "web", "v1") == 2 * QUERIES
        assert served.counted("bugs", "dns") == 0
