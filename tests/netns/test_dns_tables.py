"""The tables of the spec (dns 2.4 to 2.7), asked in a pod: each way, and in capitals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.support.builders import a_service, a_store, a_workload
from tests.support.dns import printed
from tests.support.dns_scene import RESOLVER, RESOLVER_V6, Scene, a_scene, serving
from tests.support.namespaces import needs_root
from ztunnel.model.service import IpFamilies, Visibility

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

D = "svc.cluster.local"
WEB, BIG = f"web.shop.{D}", f"big.shop.{D}"
BIG_PODS = 120
STORE = a_store(
    a_service(f"cart.shop.{D}", vips=["10.96.0.1", "fd00:96::1"]),
    a_service(f"cart.ns2.{D}", ns="ns2", vips=["10.96.0.2"]),
    a_service("api.example.com", vips=["240.240.0.3"]),
    a_service("*.b.example.com", vips=["240.240.0.4"]),
    a_service(f"v6only.shop.{D}", ip_families=IpFamilies.IPV6_ONLY, port_map={}),
    a_service(f"hidden.ns2.{D}", ns="ns2", vips=["10.96.0.7"], visibility=Visibility.NAMESPACE),
    a_service(f"db.shop.{D}", vips=["far/10.96.0.8"]),
    a_service("bare.example.com"),
    a_service("range.example.com", cidrs=["10.9.0.0/16"]),
    a_service("both.example.com", ns="ns2", vips=["240.240.0.5"], canonical=True),
    a_service("both.example.com", vips=["240.240.0.6"]),
    a_service(f"a.b.c.{D}", vips=["10.96.0.9"]),
    a_service(WEB),
    a_workload("web-0", ips=["10.1.0.7", "fd00:1::7"], services={f"shop/{WEB}": {80: 80}}),
    a_workload("web-1", ips=["10.1.0.8"], services={f"shop/{WEB}": {80: 80}}),
    a_service(BIG),
    *(
        a_workload(f"big-{n}", ips=[f"10.2.0.{n}"], services={f"shop/{BIG}": {80: 80}})
        for n in range(BIG_PODS)
    ),
)
CART, CART2 = "A 10.96.0.1", "A 10.96.0.2"
OURS, EMPTY = "NOERROR QR AA RD RA", "NOERROR QR AA RD RA SOA"
UNKNOWN, ELSEWHERE = "NXDOMAIN QR AA RD RA SOA", "REFUSED QR AA RD RA"  # says unbound

ROWS: list[tuple[str, str, str, list[str]]] = [
    # Labels of the name, with a client in `shop` (2.4).
    ("cart", "A", OURS, [f"cart. {CART}"]),
    ("cart", "AAAA", OURS, ["cart. AAAA fd00:96::1"]),
    ("cart.ns2", "A", OURS, [f"cart.ns2. {CART2}"]),
    ("cart.ns2.svc", "A", OURS, [f"cart.ns2.svc. {CART2}"]),
    ("a.b.c", "A", OURS, ["a.b.c. A 10.96.0.9"]),
    ("a.b.c.svc", "A", OURS, ["a.b.c.svc. A 10.96.0.9"]),
    ("a.b.c.d", "A", ELSEWHERE, []),
    (f"cart.ns2.{D}", "A", OURS, [f"cart.ns2.{D}. {CART2}"]),
    ("api.example.com", "A", OURS, ["api.example.com. A 240.240.0.3"]),
    # Search domains (2.4) and who owns the records (2.7).
    (f"cart.shop.{D}", "A", OURS, [f"cart.shop.{D}. {CART}"]),
    (f"cart.{D}", "A", OURS, [f"cart.{D}. CNAME cart.", f"cart. {CART}"]),
    (
        f"cart.ns2.shop.{D}",
        "A",
        OURS,
        [f"cart.ns2.shop.{D}. CNAME cart.ns2.", f"cart.ns2. {CART2}"],
    ),
    (
        f"api.example.com.shop.{D}",
        "A",
        OURS,
        [f"api.example.com.shop.{D}. CNAME api.example.com.", "api.example.com. A 240.240.0.3"],
    ),
    (
        f"a.b.example.com.shop.{D}",
        "A",
        OURS,
        [f"a.b.example.com.shop.{D}. A 240.240.0.4"],
    ),
    (f"api.example.com.ns2.{D}", "A", UNKNOWN, []),
    # Matching (2.5).
    ("x.y.b.example.com", "A", OURS, ["x.y.b.example.com. A 240.240.0.4"]),
    ("b.example.com", "A", ELSEWHERE, []),
    ("bare.example.com", "A", ELSEWHERE, []),
    ("range.example.com", "A", ELSEWHERE, []),
    ("both.example.com", "A", OURS, ["both.example.com. A 240.240.0.6"]),
    (f"hidden.ns2.{D}", "A", UNKNOWN, []),
    # Answers (2.7).
    (f"v6only.shop.{D}", "A", EMPTY, []),
    (f"v6only.shop.{D}", "AAAA", EMPTY, []),
    (f"db.shop.{D}", "A", EMPTY, []),
    (f"cart.ns2.{D}", "AAAA", EMPTY, []),
    (WEB, "A", OURS, [f"{WEB}. A 10.1.0.7", f"{WEB}. A 10.1.0.8"]),
    (WEB, "AAAA", OURS, [f"{WEB}. AAAA fd00:1::7"]),
    (f"web-1.{WEB}", "A", OURS, [f"web-1.{WEB}. A 10.1.0.8"]),
    (f"web-1.{WEB}", "AAAA", EMPTY, []),
    (f"web-2.{WEB}", "A", UNKNOWN, []),
    # Other types of our names, of which upstream knows nothing.
    *((f"cart.shop.{D}", rtype, EMPTY, []) for rtype in ("HTTPS", "TXT", "MX", "CNAME", "ANY")),
    ("api.example.com", "HTTPS", EMPTY, []),
]

# Prints what came of each row: code and flags, whether there is an SOA, and the answers.
ASK = """
import json, sys
import dns.message, dns.query, dns.flags, dns.rcode, dns.rdatatype
server, by, change, rows = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
found = []
for name, rtype in rows:
    query = dns.message.make_query(getattr(name, change)(), rtype)
    reply = getattr(dns.query, by)(query, server, timeout=10)
    assert reply.question == query.question and str(reply.question) == str(query.question)
    head = [dns.rcode.to_text(reply.rcode()), dns.flags.to_text(reply.flags)]
    head += [dns.rdatatype.to_text(rrset.rdtype) for rrset in reply.authority]
    assert not reply.additional
    answers = [
        f"{rrset.name} {dns.rdatatype.to_text(rrset.rdtype)} {data}"
        for rrset in reply.answer for data in sorted(map(str, rrset))
    ]
    assert all(rrset.ttl == 30 for rrset in reply.answer)
    found.append([" ".join(head), answers])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared: no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        yield scene


@pytest.mark.parametrize("change", ["lower", "upper"])
@pytest.mark.parametrize("by", ["udp", "tcp"])
@pytest.mark.parametrize("server", [RESOLVER, RESOLVER_V6], ids=["ipv4", "ipv6"])
async def test_the_tables_hold(scene: Scene, server: str, by: str, change: str) -> None:
    asked = json.dumps([(name, rtype) for name, rtype, *_ in ROWS])
    async with serving(scene, store=STORE):
        words = (sys.executable, "-I", "-c", ASK, server, by, change, asked)
        found = json.loads(await printed(scene.pod, *words))
    rows = [(*row[:2], *answer) for row, answer in zip(ROWS, found, strict=True)]
    assert rows == ROWS


@pytest.mark.parametrize(
    ("words", "most", "fit"),
    [
        (("+noedns", "+ignore"), 512, (512 - 12 - 32) // 16),
        (("+bufsize=900", "+ignore"), 900, (900 - 12 - 32 - 11) // 16),
        (("+bufsize=4096", "+ignore"), 4096, BIG_PODS),
        (("+noedns",), 65535, BIG_PODS),
        (("+tcp", "+noedns"), 65535, BIG_PODS),
    ],
    ids=str,
)
async def test_an_answer_of_ours_has_the_room_that_the_client_gives(
    scene: Scene, words: tuple[str, ...], most: int, fit: int
) -> None:
    async with serving(scene, store=STORE):
        text = await printed(scene.pod, "dig", f"@{RESOLVER}", "+nocookie", *words, BIG)
    flags = text.partition("flags: ")[2].partition(";")[0].split()
    assert ("tc" in flags) == (fit < BIG_PODS)
    assert text.count("\tA\t10.2.0.") == fit
    assert int(text.partition("MSG SIZE  rcvd: ")[2]) <= most
    assert ("Truncated, retrying in TCP" in text) == (words == ("+noedns",))
