from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import PROXY_MARK, RedirectPlan
from tests.support.builders import a_service, a_store, a_workload
from tests.support.dns import FakeClient, Served, a_dns_server, printed, running, with_resolv_conf
from tests.support.namespaces import connect, needs_root
from tests.support.tunnels import open_descriptors
from ztunnel.devmesh.cluster import Cluster, Member, Pod

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

RESOLVER, RESOLVER_V6, OTHER_RESOLVER = "198.51.100.53", "2001:db8::53", "198.51.100.54"
WEB = "web.shop.svc.cluster.local"
LONG = " ".join('"' + "x" * 250 + '"' for _ in range(12))

ZONE = f"""
example.org. 3600 SOA ns.example.org. admin.example.org. 1 2 3 4 60
example.org. 3600 NS ns.example.org.
example.org. 300 A 192.0.2.1
example.org. 300 AAAA 2001:db8::1
example.org. 300 MX 10 mail.example.org.
example.org. 300 TXT "v=spf1 -all" "second"
example.org. 300 CAA 0 issue "ca.example"
example.org. 300 NAPTR 10 20 "s" "SIP+D2T" "" _sip._tcp.example.org.
example.org. 300 HINFO "cpu" "os"
example.org. 300 LOC 52 0 0.000 N 4 0 0.000 E 0m 1m 10000m 10m
example.org. 300 DS 1 8 2 {"ab" * 32}
example.org. 300 DNSKEY 256 3 8 AwEAAQ==
example.org. 300 SSHFP 1 1 {"ab" * 20}
example.org. 300 HTTPS 1 . alpn=h2 ipv4hint=192.0.2.1
example.org. 300 SVCB 1 svc.example.org. port=8443
example.org. 300 TYPE65280 \\# 4 01020304
www.example.org. 300 CNAME example.org.
_sip._tcp.example.org. 300 SRV 1 2 5060 sip.example.org.
_443._tcp.example.org. 300 TLSA 3 1 1 {"cd" * 32}
long.example.org. 300 TXT {LONG}
"""

UNBOUND = """
server:
  interface: 0.0.0.0
  interface: ::0
  access-control: 0.0.0.0/0 allow
  access-control: ::0/0 allow
  username: ""
  chroot: ""
  directory: ""
  pidfile: ""
  do-daemonize: no
  use-syslog: no
  logfile: "/dev/null"
  rrset-roundrobin: no
  module-config: "iterator"
  local-zone: "." refuse
  local-zone: "cluster.local." static
  local-zone: "example.org." static
  local-zone: "2.0.192.in-addr.arpa." static
  local-data: "1.2.0.192.in-addr.arpa. 300 PTR example.org."
remote-control:
  control-enable: no
"""

START_SECONDS = 20.0

DNSMASQ = ("dnsmasq", "-k", "--no-resolv", "--no-hosts", "--user=root", "--pid-file")


def unbound_conf(folder: Path) -> Path:
    path = folder / "unbound.conf"
    data = "".join(f"  local-data: '{line}'\n" for line in ZONE.strip().splitlines())
    head, _, tail = UNBOUND.partition("remote-control:")
    path.write_text(f"{head}{data}remote-control:{tail}")
    return path


@dataclass
class Scene:
    cluster: Cluster
    pod: Pod  # whose queries are redirected
    bare: Pod  # which asks as before
    resolver: Member


@contextmanager
def a_scene(folder: Path) -> Iterator[Scene]:
    with Cluster() as cluster, ExitStack() as programs:
        node = cluster.add_node("node")
        pod = cluster.add_pod(node, "pod", "10.1.0.1", "fd00:1::1")
        bare = cluster.add_pod(node, "bare", "10.1.0.2", "fd00:1::2")
        resolver = cluster.add_outside("resolver", RESOLVER, RESOLVER_V6)
        other = cluster.add_outside("other", OTHER_RESOLVER)
        programs.enter_context(running(resolver, "unbound", "-c", str(unbound_conf(folder))))
        words = (*DNSMASQ, "--log-facility=/dev/null", "--host-record=example.org,192.0.2.99")
        programs.enter_context(running(other, *words))
        apply_redirect(pod.netns, RedirectPlan(dns=True))
        for address in (RESOLVER, OTHER_RESOLVER):
            wait_for_port(bare, address)
        yield Scene(cluster, pod, bare, resolver)


def wait_for_port(member: Member, address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            connect(member.netns, address, 53).close()
        except ConnectionRefusedError:
            time.sleep(0.02)  # another program is starting: there is nothing to wait for
            continue
        return
    pytest.fail(f"nobody listens on {address}")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        yield scene


def a_mesh_store():
    return a_store(
        a_service("cart.shop.svc.cluster.local", vips=["10.96.0.7", "fd00:96::7"]),
        a_service("bank.money.svc.cluster.local", ns="money", vips=["10.96.0.8"]),
        a_service("api.mesh.example", vips=["240.240.0.1"]),
        a_service(WEB),
        a_workload("web-0", ips=["10.1.0.7"], services={f"shop/{WEB}": {80: 8080}}),
        a_workload("web-1", ips=["10.1.0.8"], services={f"shop/{WEB}": {80: 8080}}),
    )


@asynccontextmanager
async def serving(scene: Scene, store=None) -> AsyncIterator[Served]:
    async with a_dns_server(
        store or a_mesh_store(),
        netns=scene.pod.netns,
        client=FakeClient.web(),
        addresses=("127.0.0.1:15053", "[::1]:15053"),
        mark=PROXY_MARK,
    ) as served:
        yield served


async def dig(member: Member, *words: str) -> str:
    """Ask, and print everything but what differs each time."""
    text = await printed(member, "dig", *COMPARED, *words, check=False)
    return re.sub(r"id: \d+", "id: N", text)


async def short(member: Member, *words: str) -> list[str]:
    return sorted((await printed(member, "dig", "+short", *words)).split())


TYPES = """
A AAAA MX TXT CAA NAPTR HINFO LOC DS DNSKEY SSHFP HTTPS SVCB TYPE65280 NS SOA ANY SRV TLSA PTR
"""
NAMES = [
    *[(rtype, "example.org") for rtype in TYPES.split()],
    ("A", "www.example.org"),
    ("SRV", "_sip._tcp.example.org"),
    ("TLSA", "_443._tcp.example.org"),
    ("PTR", "1.2.0.192.in-addr.arpa"),
    ("PTR", "9.2.0.192.in-addr.arpa"),
    ("A", "missing.example.org"),
    ("HTTPS", "missing.example.org"),
    ("A", "refused.example"),
    ("TXT", "long.example.org"),
    ("A", "EXAMPLE.org"),
    ("A", "."),
]
COMPARED = ("+nocookie", "+nostats", "+nocmd")
OPTIONS = [
    (),
    ("+tcp",),
    ("+noedns",),
    ("+noedns", "+ignore"),
    ("+ignore", "+bufsize=600"),
    ("+dnssec", "+cd", "+ad"),
    ("+norec", "+ednsopt=65001:abcd", "+nsid"),
    ("+edns=1", "+noednsneg"),
    ("-c", "CH"),
    ("@" + RESOLVER_V6,),
    ("+tcp", "@" + RESOLVER_V6),
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
async def test_other_names_are_answered_as_before(
    scene: Scene, tmp_path: Path, options: tuple[str, ...]
) -> None:
    queries = tmp_path / "queries"
    server = () if any(word.startswith("@") for word in options) else (f"@{RESOLVER}",)
    lines = [" ".join((*COMPARED, *server, *options, name, "-t", rtype)) for rtype, name in NAMES]
    queries.write_text("".join(f"{line}\n" for line in lines))
    async with serving(scene) as served:
        before = await dig(scene.bare, "-f", str(queries))
        assert before.count("status: ") >= len(NAMES)
        assert await dig(scene.pod, "-f", str(queries)) == before
        transports = [key[1] for key in served.metrics.dns_upstream_requests._counts]
        assert len(transports) >= len({rtype for rtype, _ in NAMES}) - 1


@pytest.mark.parametrize("by", ["+notcp", "+tcp"])
async def test_the_resolver_that_the_pod_asks_is_the_one_that_answers(
    scene: Scene, by: str
) -> None:
    async with serving(scene):
        for _ in range(3):
            assert await short(scene.pod, by, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]
            assert await short(scene.pod, by, f"@{OTHER_RESOLVER}", "example.org") == ["192.0.2.99"]


@pytest.mark.parametrize("server", [RESOLVER, RESOLVER_V6, OTHER_RESOLVER, "203.0.113.1"])
@pytest.mark.parametrize("by", ["+notcp", "+tcp"])
@pytest.mark.parametrize(
    ("name", "rtype", "expected"),
    [
        ("cart", "A", ["10.96.0.7"]),
        ("CART.Shop", "A", ["10.96.0.7"]),
        ("cart.shop.svc.cluster.local", "AAAA", ["fd00:96::7"]),
        ("bank.money.shop.svc.cluster.local", "A", ["10.96.0.8", "bank.money."]),
        ("api.mesh.example", "A", ["240.240.0.1"]),
        ("api.mesh.example", "AAAA", []),
        (WEB, "A", ["10.1.0.7", "10.1.0.8"]),
        (f"web-1.{WEB}", "A", ["10.1.0.8"]),
    ],
)
async def test_mesh_names_are_answered_whichever_resolver_is_asked(
    scene: Scene, server: str, by: str, name: str, rtype: str, expected: list[str]
) -> None:
    async with serving(scene):
        assert await short(scene.pod, by, f"@{server}", name, rtype) == expected


async def test_service_records_and_reverse_names_of_the_mesh(scene: Scene) -> None:
    async with serving(scene):
        pod, server = scene.pod, f"@{RESOLVER}"
        lines = (await printed(pod, "dig", "+short", server, WEB, "SRV")).splitlines()
        assert sorted(lines) == [f"0 1 8080 web-{n}.{WEB}." for n in (0, 1)]
        assert await short(pod, server, "-x", "10.1.0.8") == [f"web-1.{WEB}."]
        assert await short(pod, server, "-x", "10.96.0.7") == ["cart.shop.svc.cluster.local."]
        assert await short(pod, server, "-x", "192.0.2.1") == ["example.org."]


@pytest.mark.parametrize("rtype", ["HTTPS", "TXT", "SRV", "MX"])
@pytest.mark.parametrize("name", ["cart.shop.svc.cluster.local", "api.mesh.example"])
async def test_a_mesh_name_that_upstream_does_not_know_exists(
    scene: Scene, name: str, rtype: str
) -> None:
    async with serving(scene):
        assert re.search("NXDOMAIN|REFUSED", await dig(scene.bare, f"@{RESOLVER}", name))
        answer = await dig(scene.pod, f"@{RESOLVER}", name, rtype)
    assert "status: NOERROR" in answer
    assert "ANSWER: 0, AUTHORITY: 1" in answer
    assert "SOA" in answer


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


async def test_a_dead_resolver_holds_up_nobody(scene: Scene, nursery: trio.Nursery) -> None:
    async with serving(scene) as served:

        async def ask_the_dead() -> None:
            words = ("+tries=1", "+time=10", "@198.51.100.99", "example.org")
            await dig(scene.pod, *words)

        for _ in range(3):
            nursery.start_soon(ask_the_dead)
        with trio.fail_after(3):
            while served.server.resolver.upstream.queries < 3:
                await trio.lowlevel.checkpoint()
        with trio.fail_after(2):
            assert await short(scene.pod, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]
            assert await short(scene.pod, f"@{RESOLVER}", "cart.shop") == ["10.96.0.7"]
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_flood_leaves_nothing_behind(scene: Scene) -> None:
    load = Path(__file__).parents[2] / "perf" / "dns_queries.py"
    words = (sys.executable, str(load), "--seconds", "0.7", "--server", RESOLVER, "--load")
    async with serving(scene) as served:
        before = open_descriptors()
        mesh = json.loads(await printed(scene.pod, *words, "cart.shop.svc.cluster.local"))
        other = json.loads(await printed(scene.pod, *words, "example.org"))
        assert mesh["per_second"] > 1000
        assert other["per_second"] > 100
        assert (mesh["lost"], other["lost"]) == (0, 0)
        assert served.server.resolver.upstream.queries == 0
        assert not served.server._under_way
        assert open_descriptors() == before


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
