"""What one pod asks, and keeps open, is bounded, and takes nothing from another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import RedirectPlan
from tests.support.dns import printed, running_script, until
from tests.support.dns_scene import CART, RESOLVER, Scene, a_scene, serving, short
from tests.support.namespaces import needs_root
from tests.support.tunnels import open_descriptors
from ztunnel.devmesh.cluster import Pod
from ztunnel.dns import stream
from ztunnel.dns.server import CONNECTIONS_MAX
from ztunnel.dns.upstream import QUERIES_PER_SERVER_MAX

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

SILENT = "198.51.100.60"
LOAD = Path(__file__).parents[2] / "perf" / "dns_load.py"

# Takes queries and connections, and says nothing.
MUTE = """
import signal, socket
ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ours.bind(("198.51.100.60", 53))
listener = socket.create_server(("198.51.100.60", 53))
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """With a resolver that never answers; no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        silent = scene.cluster.add_outside("silent", SILENT)
        with running_script(silent, MUTE):
            yield scene


@pytest.fixture(scope="module")
def neighbour(scene: Scene) -> Pod:
    pod = scene.cluster.add_pod(scene.pod.node, "neighbour", "10.1.0.9")
    apply_redirect(pod.netns, RedirectPlan(dns=True))
    return pod


# Asks for many names at once; prints how often which response code came.
GREEDY = """
import collections, json, select, socket, sys
count, codes = int(sys.argv[2]), collections.Counter()
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[1], 53))
def take(seconds):
    while select.select([sock], [], [], seconds)[0]:
        codes[sock.recv(4096)[3] & 15] += 1
        seconds = 0
for number in range(count):
    label = b"n%d" % number
    name = bytes([len(label)]) + label + b"\\7example\\3org\\0"
    sock.send(number.to_bytes(2, "big") + b"\\1\\0\\0\\1" + bytes(6) + name + b"\\0\\1\\0\\1")
    take(0)
while codes.total() < count:
    take(10)
print(json.dumps(codes))
"""
GREEDY_QUERIES = 2000


async def test_what_one_pod_waits_for_takes_nothing_from_another(
    scene: Scene, neighbour: Pod
) -> None:
    codes: dict[str, int] = {}

    async def ask_in_vain() -> None:
        words = (sys.executable, "-I", "-S", "-c", GREEDY, SILENT, str(GREEDY_QUERIES))
        codes.update(json.loads(await printed(scene.pod, *words)))

    async with (
        serving(scene) as greedy,
        serving(scene, netns=neighbour.netns) as modest,
        trio.open_nursery() as nursery,
    ):
        upstream = greedy.server.resolver.upstream
        nursery.start_soon(ask_in_vain)
        await until(lambda: greedy.counted("limits_reached", "dns_queries_per_pod") > 0)
        assert upstream.queries == QUERIES_PER_SERVER_MAX
        # Its other resolvers, and names of the mesh, are there for itself, too.
        assert await short(scene.pod, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]
        assert await short(scene.pod, f"@{RESOLVER}", CART) == ["10.96.0.7"]
        for name in ("example.org", CART):
            words = (
                sys.executable,
                "-P",
                str(LOAD),
                "--server",
                RESOLVER,
                "--queries",
                "300",
                name,
            )
            found = json.loads(await printed(neighbour, *words))
            assert (found["answers"], found["lost"]) == (300, 0)
        assert modest.counted("limits_reached", "dns_queries_per_pod") == 0
    assert codes == {"2": GREEDY_QUERIES}
    assert upstream.queries == 0


async def test_a_pod_that_floods_takes_nothing_from_another(scene: Scene, neighbour: Pod) -> None:
    load = (sys.executable, "-P", str(LOAD), "--server", RESOLVER)
    async with (
        serving(scene) as greedy,
        serving(scene, netns=neighbour.netns) as modest,
        trio.open_nursery() as nursery,
    ):
        for name in ("example.org", CART):
            words = (*load, name, "--window", "512", "--fresh", "--seconds", "60")
            nursery.start_soon(partial(printed, scene.pod, *words, check=False))
        await until(lambda: greedy.counted("dns_requests", "a", "udp", "web", "v1") > 1000)
        before = greedy.counted("dns_requests", "a", "udp", "web", "v1")
        for name in ("example.org", CART):
            found = json.loads(await printed(neighbour, *load, name, "--queries", "500"))
            assert (found["answers"], found["lost"], found["wrong"]) == (500, 0, 0)
        # It went on all the while.
        assert greedy.counted("dns_requests", "a", "udp", "web", "v1") > before + 500
        assert modest.counted("limits_reached", "dns_queries_per_pod") == 0
        nursery.cancel_scope.cancel()


# Opens connections, sends half a query by each, and waits for the end of all.
CLINGING = """
import select, socket, sys
socks = [socket.create_connection((sys.argv[1], 53)) for _ in range(int(sys.argv[2]))]
for sock in socks:
    try: sock.sendall(b"\\0\\x1c\\x12")
    except OSError: pass
print("clinging", flush=True)
for sock in socks:
    try: assert sock.recv(1) == b""
    except ConnectionResetError: pass
print("all are closed")
"""


async def test_connections_that_ask_nothing_are_bounded_and_end(
    scene: Scene, neighbour: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "IDLE_SECONDS", 2.0)
    excess = 20
    async with serving(scene) as served, serving(scene, netns=neighbour.netns):
        before = open_descriptors()

        async def cling() -> None:
            words = (sys.executable, "-I", "-S", "-c", CLINGING, RESOLVER)
            text = await printed(scene.pod, *words, str(CONNECTIONS_MAX + excess))
            assert text.split("\n")[1] == "all are closed"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cling)
            await until(lambda: served.counted("limits_reached", "dns_queries_per_pod") >= excess)
            assert await short(scene.pod, "+notcp", f"@{RESOLVER}", CART) == ["10.96.0.7"]
            assert await short(neighbour, "+tcp", f"@{RESOLVER}", CART) == ["10.96.0.7"]
        assert served.server._connections == 0
        assert open_descriptors() == before
        assert await short(scene.pod, "+tcp", f"@{RESOLVER}", CART) == ["10.96.0.7"]


# Answers what begins with `slow` only when it has been asked for `release`.
GATE = """
import socket, sys, threading
here, released = (sys.argv[1], 53), threading.Event()
def answer(query):
    if b"slow" in query: released.wait()
    if b"release" in query: released.set()
    return query[:2] + b"\\x81\\x80" + query[4:]
def serve(sock):
    with sock:
        query = sock.recv(4096)[2:]
        reply = answer(query)
        sock.sendall(len(reply).to_bytes(2, "big") + reply)
def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],)).start()
def reply(query, sender):
    ours.sendto(answer(query), sender)
listener = socket.create_server(here)
ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ours.bind(here)
threading.Thread(target=accept).start()
print("ready", flush=True)
while True:
    threading.Thread(target=reply, args=ours.recvfrom(4096)).start()
"""

# Asks for four names at once, by one connection or socket; prints them as the answers come.
AT_ONCE = """
import socket, sys
names, server = [b"slow", b"fast", b"release", b"cart"], (sys.argv[1], 53)
def query(number, name):
    rest = b"" if name == b"cart" else b"\\7example\\3org"
    head = bytes([0, number]) + b"\\1\\0\\0\\1" + bytes(6)
    return head + bytes([len(name)]) + name + rest + b"\\0\\0\\1\\0\\1"
if sys.argv[2] == "tcp":
    sock = socket.create_connection(server, 10)
    stream = sock.makefile("rb")
    send = lambda data: sock.sendall(len(data).to_bytes(2, "big") + data)
    receive = lambda: stream.read(int.from_bytes(stream.read(2), "big"))
else:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.connect(server)
    send, receive = sock.send, lambda: sock.recv(4096)
for number, name in enumerate(names):
    send(query(number, name))
print(*(names[receive()[1]].decode() for _ in names))
"""


@pytest.mark.parametrize(("by", "address"), [("udp", "198.51.100.61"), ("tcp", "198.51.100.62")])
async def test_a_slow_answer_holds_up_none_of_the_same_client(
    scene: Scene, by: str, address: str
) -> None:
    gate = scene.cluster.add_outside(f"gate by {by}", address)
    with running_script(gate, GATE, address):
        async with serving(scene):
            words = (sys.executable, "-I", "-S", "-c", AT_ONCE, address, by)
            names = (await printed(scene.pod, *words)).split()
    # Who waited for `slow` before it asked for `release` would wait for ever.
    assert sorted(names) == ["cart", "fast", "release", "slow"]
    assert names[0] != "slow"
