"""Pods and resolvers that mean harm, or are broken: nobody else notices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.support.dns import printed, running_script
from tests.support.dns_corpus import MALFORMED
from tests.support.dns_scene import RESOLVER, Scene, a_scene, serving, short
from tests.support.namespaces import needs_root

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

CORPUS = json.dumps([data.hex() for data in MALFORMED.values()])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        yield scene


LIAR = "198.51.100.56"
FORGERIES = """
import socket
ours, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
ours.bind(("198.51.100.56", 53)); other.bind(("198.51.100.56", 54))
print("ready", flush=True)
def answer(query, ip):
    end = query.index(0, 12) + 5
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + bytes(ip)
    return query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + record
while True:
    query, sender = ours.recvfrom(4096)
    forged = answer(query, [192, 0, 2, 66])
    for number in range(200):
        guess = (int.from_bytes(query[:2], "big") + 1 + number) % 65536
        ours.sendto(guess.to_bytes(2, "big") + forged[2:], sender)
    ours.sendto(forged.replace(b"example", b"forgery"), sender)
    other.sendto(forged, sender)
    other.sendto(forged, (sender[0], sender[1] ^ 1))
    ours.sendto(answer(query, [192, 0, 2, 1]), sender)
"""


async def test_forged_answers_are_not_believed(scene: Scene) -> None:
    liar = scene.cluster.add_outside("liar", LIAR)
    with running_script(liar, FORGERIES):
        async with serving(scene):
            for _ in range(20):
                assert await short(scene.pod, f"@{LIAR}", "example.org") == ["192.0.2.1"]


# Answers each query with all of the corpus, its id and the flags of an answer, and then rightly.
BROKEN = """
import json, socket, sys, threading
corpus = [bytes.fromhex(text) for text in json.loads(sys.argv[1])]
def answers(query):
    yield from (query[:2] + b"\\x81\\x80" + data[4:] for data in corpus)
    yield from (b"", query[:2], query[:11], query, bytes(65000))
    end = query.index(0, 12) + 5
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4\\xc0\\0\\2\\1"
    yield query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + record
def serve_stream():
    while True:
        sock, _ = listener.accept()
        with sock:
            query = sock.recv(4096)[2:]
            sock.sendall(b"".join(len(one).to_bytes(2, "big") + one for one in answers(query)))
listener = socket.create_server(("198.51.100.57", 53))
ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ours.bind(("198.51.100.57", 53))
threading.Thread(target=serve_stream, daemon=True).start()
print("ready", flush=True)
while True:
    query, sender = ours.recvfrom(4096)
    for one in answers(query):
        ours.sendto(one, sender)
"""
BROKEN_RESOLVER = "198.51.100.57"


async def test_a_broken_resolver_is_heard_when_it_makes_sense(scene: Scene) -> None:
    broken = scene.cluster.add_outside("broken", BROKEN_RESOLVER)
    with running_script(broken, BROKEN, CORPUS):
        async with serving(scene) as served:
            for by in ("+notcp", "+tcp") * 3:
                words = (by, f"@{BROKEN_RESOLVER}", "example.org")
                assert await short(scene.pod, *words) == ["192.0.2.1"]
            assert served.counted("bugs", "dns") == 0


# Sends the corpus by UDP and TCP, and prints the answers; a good query ends each.
CLIENT = """
import json, socket, sys
server, corpus = (sys.argv[1], 53), [bytes.fromhex(text) for text in json.loads(sys.argv[2])]
good = b"\\xab\\xcd\\1\\0\\0\\1" + bytes(6) + b"\\4cart\\4shop\\0\\0\\1\\0\\1"
found = {"udp": [], "tcp": []}
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect(server)
    for message in (*corpus, good):
        sock.send(message)
        found["udp"].append(sock.recv(4096).hex())
with socket.create_connection(server, 10) as sock, sock.makefile("rb") as stream:
    for message in (*corpus, good):
        sock.sendall(len(message).to_bytes(2, "big") + message)
        found["tcp"].append(stream.read(int.from_bytes(stream.read(2), "big")).hex())
print(json.dumps(found))
"""


async def test_each_malformed_query_is_refused_by_itself(scene: Scene) -> None:
    async with serving(scene) as served:
        words = (sys.executable, "-I", "-S", "-c", CLIENT, RESOLVER, CORPUS)
        found = json.loads(await printed(scene.pod, *words))
        assert served.counted("dns_answers", "proxy", "formerr") == 2 * len(MALFORMED)
        assert served.counted("dns_requests", "a", "udp", "web", "v1") == 1
        assert served.counted("dns_requests", "a", "tcp", "web", "v1") == 1
        assert served.counted("bugs", "dns") == 0
    refusals = ["12678181" + "00" * 8] * len(MALFORMED)
    for answers in found.values():
        assert answers[:-1] == refusals
        assert answers[-1].startswith("abcd8580")
        assert answers[-1].endswith("0a600007")


async def test_junk_from_the_pod_does_not_stop_the_server(scene: Scene) -> None:
    script = (
        "import random,socket;r=random.Random(1)\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"for n in range(2000): s.sendto(r.randbytes(r.randrange(1,80)),('{RESOLVER}',53))\n"
        f"c=socket.create_connection(('{RESOLVER}',53));c.sendall(r.randbytes(70000))\n"
    )
    async with serving(scene) as served:
        await printed(scene.pod, sys.executable, "-I", "-S", "-c", script)
        assert await short(scene.pod, f"@{RESOLVER}", "cart.shop") == ["10.96.0.7"]
        assert served.counted("bugs", "dns") == 0
