from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import dns.rdatatype
import pytest
import trio
import trio.testing

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import RedirectPlan
from tests.support.dns import printed, running_script, until
from tests.support.dns_scene import (
    CART,
    COMPARED,
    OTHER_RESOLVER,
    RESOLVER,
    RESOLVER_V6,
    WEB,
    Scene,
    a_scene,
    dig,
    serving,
    short,
)
from tests.support.namespaces import needs_root

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


# Neither what is no record (OPT, TKEY, TSIG) nor transfers, which have tests of their own.
ALL_TYPES = sorted(int(rtype) for rtype in dns.rdatatype.RdataType if not 249 <= rtype <= 252)
ALL_TYPES.remove(dns.rdatatype.OPT)


@pytest.mark.parametrize("by", ["+notcp", "+tcp"])
async def test_every_type_is_answered_as_before(scene: Scene, tmp_path: Path, by: str) -> None:
    queries = tmp_path / "queries"
    head = " ".join((*COMPARED, f"@{RESOLVER}", by, "example.org"))
    queries.write_text("".join(f"{head} -t TYPE{number}\n" for number in ALL_TYPES))
    async with serving(scene):
        before = await dig(scene.bare, "-f", str(queries))
        assert before.count("status: ") == len(ALL_TYPES)
        assert len(re.findall("ANSWER: [1-9]", before)) > 25
        assert await dig(scene.pod, "-f", str(queries)) == before


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
        assert sorted(lines) == [f"0 50 8080 web-{n}.{WEB}." for n in (0, 1)]
        for name, target in [
            (f"web-0.{WEB}", f"0 100 8080 web-0.{WEB}."),
            (f"_80._tcp.web-0.{WEB}", f"0 100 8080 web-0.{WEB}."),
            (f"_80._tcp.{CART}", f"0 100 80 {CART}."),
            (CART, f"0 100 80 {CART}."),
        ]:
            assert await printed(pod, "dig", "+short", server, name, "SRV") == f"{target}\n"
        assert await short(pod, server, "-x", "10.1.0.8") == [f"web-1.{WEB}."]
        assert await short(pod, server, "-x", "10.96.0.7") == ["cart.shop.svc.cluster.local."]
        assert await short(pod, server, "-x", "192.0.2.1") == ["example.org."]


@pytest.mark.parametrize("by", ["+notcp", "+tcp"])
async def test_service_records_bring_the_addresses_of_their_hosts(scene: Scene, by: str) -> None:
    async with serving(scene):
        text = await dig(scene.pod, by, f"@{RESOLVER}", f"_80._tcp.{WEB}", "SRV")
        assert "flags: qr aa rd ra; QUERY: 1, ANSWER: 2, AUTHORITY: 0, ADDITIONAL: 3" in text
        for number in (0, 1):
            assert f"web-{number}.{WEB}. 30 IN A 10.1.0.{7 + number}" in " ".join(text.split())


@pytest.mark.parametrize("rtype", ["HTTPS", "TXT", "NAPTR", "MX"])
@pytest.mark.parametrize("name", [CART, "api.mesh.example"])
async def test_a_mesh_name_that_upstream_does_not_know_exists(
    scene: Scene, name: str, rtype: str
) -> None:
    async with serving(scene):
        assert re.search("NXDOMAIN|REFUSED", await dig(scene.bare, f"@{RESOLVER}", name))
        answer = await dig(scene.pod, f"@{RESOLVER}", name, rtype)
    assert "status: NOERROR" in answer
    assert "ANSWER: 0, AUTHORITY: 1" in answer
    assert "SOA" in answer


WITNESS = "198.51.100.57"
# Answers with the address of whoever asks.
WHO_ASKS = """
import socket, threading
def answer(query, sender):
    end = query.index(0, 12) + 5
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + socket.inet_aton(sender[0])
    return query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + record
def serve_streams():
    while True:
        sock, sender = listener.accept()
        with sock:
            reply = answer(sock.recv(4096)[2:], sender)
            sock.sendall(len(reply).to_bytes(2, "big") + reply)
listener = socket.create_server(("198.51.100.57", 53))
ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ours.bind(("198.51.100.57", 53))
threading.Thread(target=serve_streams, daemon=True).start()
print("ready", flush=True)
while True:
    query, sender = ours.recvfrom(4096)
    ours.sendto(answer(query, sender), sender)
"""


async def test_what_is_passed_on_comes_from_the_pods_address(scene: Scene) -> None:
    witness = scene.cluster.add_outside("witness", WITNESS)
    with running_script(witness, WHO_ASKS):
        async with serving(scene):
            for by in ("+notcp", "+tcp"):
                found = await short(scene.pod, by, f"@{WITNESS}", "example.org")
                assert found == [str(scene.pod.addresses[0])]


async def test_a_dead_resolver_holds_up_nobody(scene: Scene, nursery: trio.Nursery) -> None:
    async with serving(scene) as served:

        async def ask_the_dead() -> None:
            words = ("+tries=1", "+time=10", "@198.51.100.99", "example.org")
            await dig(scene.pod, *words)

        for _ in range(3):
            nursery.start_soon(ask_the_dead)
        await until(lambda: served.server.resolver.upstream.queries == 3)
        with trio.fail_after(4):
            assert await short(scene.pod, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]
            assert await short(scene.pod, f"@{RESOLVER}", "cart.shop") == ["10.96.0.7"]
        nursery.cancel_scope.cancel()


async def test_a_pod_without_ipv6_on_its_loopback_is_served_by_ipv4(scene: Scene) -> None:
    pod = scene.cluster.add_pod(scene.pod.node, "v4only", "10.1.0.3")
    switch = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    pod.netns.call(lambda: switch.write_text("1"))
    apply_redirect(pod.netns, RedirectPlan(dns=True))
    async with serving(scene, netns=pod.netns) as served:
        assert [str(here) for here in served.server.addresses] == ["127.0.0.1:15053"]
        assert await short(pod, f"@{RESOLVER}", "cart.shop") == ["10.96.0.7"]
        assert await short(pod, f"@{RESOLVER}", "example.org") == ["192.0.2.1"]


async def test_one_pod_is_not_served_by_anothers_server(scene: Scene) -> None:
    pod = scene.cluster.add_pod(scene.pod.node, "alone", "10.1.0.4")
    apply_redirect(pod.netns, RedirectPlan(dns=True))
    async with serving(scene):
        words = ("+tries=1", "+time=1", f"@{RESOLVER}", "cart.shop")
        assert "status" not in await dig(pod, *words)
