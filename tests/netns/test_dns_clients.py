from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dns import printed, with_resolv_conf
from tests.support.dns_scene import OTHER_RESOLVER, RESOLVER, WEB, Scene, a_scene, serving
from tests.support.namespaces import needs_root
from ztunnel.devmesh.cluster import Pod

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        yield scene


def resolv_conf(folder: Path, *servers: str) -> Path:
    path = folder / "resolv.conf"
    search = "shop.svc.cluster.local svc.cluster.local cluster.local"
    lines = "".join(f"nameserver {server}\n" for server in servers)
    path.write_text(f"{lines}search {search}\noptions ndots:5 timeout:2\n")
    return path


@pytest.mark.requires_program("getent", "unshare")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cart", {"10.96.0.7", "fd00:96::7"}),
        ("cart.shop", {"10.96.0.7", "fd00:96::7"}),
        ("bank.money", {"10.96.0.8"}),
        ("web", {"10.1.0.7", "10.1.0.8"}),
        ("web-0.web", {"10.1.0.7"}),
        ("example.org", {"192.0.2.1", "2001:db8::1"}),
    ],
)
async def test_glibc_finds_names(
    scene: Scene, tmp_path: Path, name: str, expected: set[str]
) -> None:
    conf = resolv_conf(tmp_path, RESOLVER)
    async with serving(scene):
        words = with_resolv_conf(conf, "getent", "ahosts", name)
        text = await printed(scene.pod, *words)
    assert {line.split()[0] for line in text.splitlines()} == expected


@pytest.mark.requires_program("getent", "unshare")
async def test_glibc_goes_on_to_its_next_resolver_if_the_first_is_dead(
    scene: Scene, tmp_path: Path
) -> None:
    conf = resolv_conf(tmp_path, "198.51.100.99", OTHER_RESOLVER)
    async with serving(scene):
        words = with_resolv_conf(conf, "getent", "ahostsv4", "example.org.")
        assert "192.0.2.99" in await printed(scene.pod, *words)


@pytest.mark.requires_program("busybox", "unshare")
async def test_busybox_finds_names(scene: Scene, tmp_path: Path) -> None:
    conf = resolv_conf(tmp_path, RESOLVER, OTHER_RESOLVER)
    async with serving(scene):
        for name, ip in [
            ("cart.shop.svc.cluster.local", "10.96.0.7"),
            ("example.org", "192.0.2.1"),
        ]:
            words = with_resolv_conf(conf, "busybox", "nslookup", name)
            assert ip in await printed(scene.pod, *words)


# Prints what getaddrinfo says. musl's asks all servers at once, A and AAAA from one socket.
GETADDRINFO = r"""
#include <stdio.h>
#include <netdb.h>
#include <arpa/inet.h>
int main(int count, char **words) {
  for (int i = 1; i < count; i++) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = 0;
    int error = getaddrinfo(words[i], 0, &hints, &found);
    printf("%s:", words[i]);
    if (error) printf(" %s", gai_strerror(error));
    for (struct addrinfo *one = found; one; one = one->ai_next) {
      char text[64];
      void *ip = one->ai_family == AF_INET
        ? (void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
        : (void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
      printf(" %s", inet_ntop(one->ai_family, ip, text, sizeof text));
    }
    printf("\n");
  }
}
"""


def built_with_musl(folder: Path) -> str:
    source, program = folder / "lookup.c", folder / "lookup"
    source.write_text(GETADDRINFO)
    subprocess.run(["musl-gcc", "-static", "-o", program, source], check=True)
    return str(program)


async def looked_up(pod: Pod, conf: Path, program: str, *names: str) -> dict[str, set[str]]:
    """Run it; an error is the words of its text."""
    text = await printed(pod, *with_resolv_conf(conf, program, *names))
    lines = (line.partition(": ") for line in text.splitlines())
    return {name: set(found.split()) for name, _, found in lines}


@pytest.mark.requires_program("musl-gcc", "unshare")
async def test_musl_finds_names(scene: Scene, tmp_path: Path) -> None:
    conf, program = resolv_conf(tmp_path, RESOLVER), built_with_musl(tmp_path)
    names = {
        "cart": {"10.96.0.7", "fd00:96::7"},
        "cart.shop": {"10.96.0.7", "fd00:96::7"},
        "bank.money": {"10.96.0.8"},
        "web": {"10.1.0.7", "10.1.0.8"},
        "web-0.web": {"10.1.0.7"},
        "api.mesh.example": {"240.240.0.1"},
    }
    others = ["example.org", "www.example.org", "missing.example.org"]
    async with serving(scene):
        found = await looked_up(scene.pod, conf, program, *names, *others)
        bare = await looked_up(scene.bare, conf, program, *others)
    assert {name: found[name] for name in names} == names
    assert {name: found[name] for name in others} == bare
    assert bare["example.org"] == {"192.0.2.1", "2001:db8::1"}


@pytest.mark.requires_program("musl-gcc", "unshare")
async def test_musl_asks_several_resolvers_at_once(scene: Scene, tmp_path: Path) -> None:
    conf = resolv_conf(tmp_path, "198.51.100.99", RESOLVER)
    program = built_with_musl(tmp_path)
    async with serving(scene):
        found = await looked_up(scene.pod, conf, program, "example.org.", "cart.shop")
    assert found == {
        "example.org.": {"192.0.2.1", "2001:db8::1"},
        "cart.shop": {"10.96.0.7", "fd00:96::7"},
    }


NODE = """
const dns = require('dns').promises, names = process.argv.slice(1);
(async () => {
  const found = {};
  for (const name of names) {
    const looked = await dns.lookup(name, {all: true});
    found[name] = looked.map((one) => one.address).sort();
    found['4 ' + name] = (await dns.resolve4(name)).sort();
  }
  found.mx = await dns.resolveMx('example.org');
  found.srv = (await dns.resolveSrv('%s')).map((one) => one.port);
  found.at = (await dns.resolveSrv('_80._tcp.%s')).map((one) => one.name).sort();
  found.missing = await dns.resolve4('missing.example.org').catch((error) => error.code);
  found.empty = await dns.resolve6('api.mesh.example').catch((error) => error.code);
  console.log(JSON.stringify(found));
})();
""".replace("%s", WEB)


@pytest.mark.requires_program("node", "unshare")
async def test_node_finds_names(scene: Scene, tmp_path: Path) -> None:
    conf = resolv_conf(tmp_path, RESOLVER)
    names = ["cart.shop.svc.cluster.local", "example.org"]
    async with serving(scene):
        words = with_resolv_conf(conf, "node", "-e", NODE, *names)
        found = json.loads(await printed(scene.pod, *words))
    assert found == {
        "cart.shop.svc.cluster.local": ["10.96.0.7", "fd00:96::7"],
        "4 cart.shop.svc.cluster.local": ["10.96.0.7"],
        "example.org": ["192.0.2.1", "2001:db8::1"],
        "4 example.org": ["192.0.2.1"],
        "mx": [{"exchange": "mail.example.org", "priority": 10}],
        "srv": [8080, 8080],
        "at": [f"web-{number}.{WEB}" for number in (0, 1)],
        "missing": "ENOTFOUND",
        "empty": "ENODATA",
    }


PARALLEL = """
import json, socket, sys
def query(number, name, rtype):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    head = number.to_bytes(2, "big") + b"\\1\\0\\0\\1" + bytes(6)
    return head + labels + b"\\0\\0" + bytes([rtype]) + b"\\0\\1"
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
name, servers = sys.argv[1], sys.argv[2:]
for turn, server in enumerate(servers):
    sock.sendto(query(2 * turn, name, 1), (server, 53))
    sock.sendto(query(2 * turn + 1, name, 28), (server, 53))
answers = []
for _ in range(2 * len(servers)):
    data, sender = sock.recvfrom(4096)
    ip = ".".join(map(str, data[-4:])) if data[7] and not data[1] % 2 else ""
    answers.append((sender[0], data[1], data[7], ip))
print(json.dumps(sorted(answers)))
"""


async def test_a_and_aaaa_from_one_socket_to_two_resolvers_at_once(scene: Scene) -> None:
    servers = (RESOLVER, OTHER_RESOLVER)
    async with serving(scene):
        words = (sys.executable, "-I", "-S", "-c", PARALLEL)
        other = json.loads(await printed(scene.pod, *words, "example.org", *servers))
        mesh = json.loads(await printed(scene.pod, *words, "cart.shop", *servers))
    assert other == [
        [RESOLVER, 0, 1, "192.0.2.1"],
        [RESOLVER, 1, 1, ""],
        [OTHER_RESOLVER, 2, 1, "192.0.2.99"],
        [OTHER_RESOLVER, 3, 0, ""],
    ]
    assert mesh == [
        [RESOLVER, 0, 1, "10.96.0.7"],
        [RESOLVER, 1, 1, ""],
        [OTHER_RESOLVER, 2, 1, "10.96.0.7"],
        [OTHER_RESOLVER, 3, 1, ""],
    ]
