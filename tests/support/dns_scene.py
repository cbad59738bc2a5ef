"""A pod whose DNS queries are redirected, one that asks as before, and two real resolvers."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import PROXY_MARK, RedirectPlan
from tests.support.builders import a_service, a_store, a_workload
from tests.support.dns import FakeClient, Served, a_dns_server, printed, running
from tests.support.namespaces import connect
from ztunnel.devmesh.cluster import Cluster, Member, Pod
from ztunnel.linux.netns import PodNetns
from ztunnel.state.store import Store

RESOLVER, RESOLVER_V6, OTHER_RESOLVER = "198.51.100.53", "2001:db8::53", "198.51.100.54"
WEB, CART = "web.shop.svc.cluster.local", "cart.shop.svc.cluster.local"
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
example.org. 300 RP admin.example.org. txt.example.org.
example.org. 300 AFSDB 1 afs.example.org.
example.org. 300 CERT PKIX 1 8 AwEAAQ==
example.org. 300 URI 10 1 "https://example.org/"
example.org. 300 OPENPGPKEY AwEAAQ==
example.org. 300 SMIMEA 3 1 1 {"ab" * 32}
example.org. 300 EUI48 00-00-5e-00-53-2a
example.org. 300 CDS 1 8 2 {"ab" * 32}
example.org. 300 KX 10 kx.example.org.
example.org. 300 APL 1:192.0.2.0/24
example.org. 300 SPF "v=spf1 -all"
example.org. 300 DHCID AAIBY2/AuCccgoJbsaxcQc9TUapptP69lOjxfNuVAA2kjEA=
www.example.org. 300 CNAME example.org.
_sip._tcp.example.org. 300 SRV 1 2 5060 sip.example.org.
_443._tcp.example.org. 300 TLSA 3 1 1 {"cd" * 32}
long.example.org. 300 TXT {LONG}
cluster.local. 60 SOA ns.dns.cluster.local. admin.cluster.local. 1 2 3 4 60
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

# What differs each time is not asked for, or not shown.
COMPARED = ("+nocookie", "+nostats", "+nocmd")

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


def a_mesh_store() -> Store:
    return a_store(
        a_service(CART, vips=["10.96.0.7", "fd00:96::7"]),
        a_service("bank.money.svc.cluster.local", ns="money", vips=["10.96.0.8"]),
        a_service("api.mesh.example", vips=["240.240.0.1"]),
        a_service(WEB),
        a_workload("web-0", ips=["10.1.0.7"], services={f"shop/{WEB}": {80: 8080}}),
        a_workload("web-1", ips=["10.1.0.8"], services={f"shop/{WEB}": {80: 8080}}),
    )


@asynccontextmanager
async def serving(
    scene: Scene, netns: PodNetns | None = None, store: Store | None = None
) -> AsyncIterator[Served]:
    async with a_dns_server(
        store or a_mesh_store(),
        netns=netns or scene.pod.netns,
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
