"""Whole zones from a real authority: answers of many messages by TCP, signed and not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from tests.support.dns import printed, running, until
from tests.support.dns_scene import RESOLVER, Scene, a_scene, dig, serving, short, wait_for_port
from tests.support.namespaces import needs_root
from ztunnel.devmesh.cluster import Member
from ztunnel.dns import stream as dns_stream

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq", "nsd"),
]

AUTHORITY = "198.51.100.55"
HOSTS = 20_000  # some 600 KB
SOA = "@ 3600 SOA ns.zone.example. admin.zone.example. 7 2 3 4 60\n@ 3600 NS ns.zone.example.\n"
SECRET = "c2VjcmV0IG9mIHRoZSB0ZXN0cw=="
KEY = ("-y", f"hmac-sha256:transfer:{SECRET}")
QUESTION = ("+tcp", f"@{AUTHORITY}", "zone.example")

NSD = """
server:
  username: ""
  chroot: ""
  zonesdir: "{folder}"
  database: ""
  pidfile: ""
  xfrdfile: ""
  zonelistfile: "{folder}/zones"
  logfile: "/dev/null"
  server-count: 1
remote-control:
  control-enable: no
key:
  name: "transfer"
  algorithm: hmac-sha256
  secret: "{secret}"
zone:
  name: "zone.example"
  zonefile: "zone"
  provide-xfr: 0.0.0.0/0 NOKEY
  provide-xfr: 0.0.0.0/0 transfer
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    folder = tmp_path_factory.mktemp("transfers")
    conf = folder / "nsd.conf"
    conf.write_text(NSD.format(folder=folder, secret=SECRET))
    hosts = "".join(f"h{n} 300 A 192.0.{n // 250}.{n % 250}\n" for n in range(HOSTS))
    (folder / "zone").write_text(f"$ORIGIN zone.example.\n{SOA}{hosts}")
    with a_scene(folder) as scene:
        authority = scene.cluster.add_outside("authority", AUTHORITY)
        with running(authority, "nsd", "-d", "-c", str(conf)):
            wait_for_port(scene.bare, AUTHORITY)
            yield scene


async def records(member: Member, *words: str) -> list[str]:
    """Ask, and give the records in order; a signature differs each time."""
    text = await dig(member, *QUESTION, *words)
    assert "verify" not in text
    return [line for line in text.splitlines() if line[:1] not in ("", ";") and "TSIG" not in line]


@pytest.mark.parametrize("key", [(), KEY], ids=["plain", "signed"])
@pytest.mark.parametrize("rtype", ["AXFR", "IXFR=6"])
async def test_a_zone_is_transferred_as_before(
    scene: Scene, rtype: str, key: tuple[str, ...]
) -> None:
    async with serving(scene) as served:
        before = await records(scene.bare, *key, rtype)
        assert len(before) == HOSTS + 3  # the SOA at both ends, NS
        assert await records(scene.pod, *key, rtype) == before
        name = rtype[:4].lower()
        assert served.counted("dns_upstream_requests", name, "tcp", "web", "v1") == 1
        assert served.counted("dns_upstream_failures", name, "tcp", "web", "v1") == 0


async def test_it_comes_in_many_messages(scene: Scene) -> None:
    async with serving(scene):
        text = await printed(scene.pod, "dig", *QUESTION, "AXFR")
        found = re.search(r"XFR size: (\d+) records \(messages (\d+),", text)
        assert found
        assert int(found[1]) == HOSTS + 3
        assert int(found[2]) > 10


async def test_a_refused_transfer_is_refused(scene: Scene) -> None:
    async with serving(scene):
        words = ("-y", f"hmac-sha256:stranger:{SECRET}", "AXFR")
        before = await dig(scene.bare, *QUESTION, *words)
        assert "BADKEY" in before
        after = await dig(scene.pod, *QUESTION, *words)
        assert without_time(after) == without_time(before)


def without_time(text: str) -> str:
    return re.sub(r"\d{10} 300 0 \d+", "T", text)


GREEDY = """
import socket, sys
name = b"\\4zone\\7example\\0"
question = b"\\0\\0\\1\\0\\0\\1" + bytes(6) + name + b"\\0\\xfc\\0\\1"
sock = socket.create_connection((sys.argv[1], 53))
sock.sendall((len(question).to_bytes(2, "big") + question) * 20)
print("asked", flush=True)
sys.stdin.read()
"""


async def test_who_does_not_read_what_it_asked_for_is_cut_off(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_stream, "SEND_SECONDS", 1.0)
    async with serving(scene) as served:
        upstream = served.server.resolver.upstream
        words = (sys.executable, "-I", "-S", "-c", GREEDY, AUTHORITY)
        async with trio.open_nursery() as nursery:
            start = partial(trio.run_process, scene.pod.command(*words), stdin=subprocess.PIPE)
            program = await nursery.start(start)
            await until(lambda: upstream.queries == 20)
            # Others are answered meanwhile.
            assert await short(scene.pod, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]
            await until(lambda: not upstream.queries and not served.server._connections)
            program.stdin.close()
        assert served.counted("bugs", "dns") == 0
