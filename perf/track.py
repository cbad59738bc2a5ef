"""Where a contender runs: a client's and a server's pod with one cable between them.

Every contender has a track of its own, all alike, so that all can be up at once and measured in
turn. Each track also has two namespaces without any cable, in which node proxies live, and a host
outside the mesh. Captured is what the node agent's own rules capture, for every contender.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cni.redirect.apply import apply_redirect
from cni.redirect.plan import RedirectPlan
from ztunnel.devmesh.cluster import Member, new_namespace
from ztunnel.devmesh.links import LOOPBACK_INDEX, Links

CLIENT_IP = IPv4Address("10.0.1.10")
SERVER_IP = IPv4Address("10.0.2.10")
OUTSIDE_IP = IPv4Address("203.0.113.10")
# Source addresses to use up, one for each connection that must not share a tunnel.
SOURCES = IPv4Network("10.128.0.0/9")
# All of these are the outside host: as many destinations as one likes.
PLAIN = IPv4Network("10.96.0.0/16")
APP_PORT = 9000

_ETH0, _ETH1 = 2, 3
# Thousands of connections a second leave as many closed ones behind; a minute of them is more than
# the kernel has ports and conntrack entries for.
SETTINGS = {
    "net/ipv4/ip_local_port_range": "1024 65535",
    "net/ipv4/tcp_tw_reuse": "1",
    "net/netfilter/nf_conntrack_tcp_timeout_time_wait": "1",
    "net/netfilter/nf_conntrack_tcp_timeout_close": "1",
    "net/netfilter/nf_conntrack_tcp_timeout_last_ack": "1",
}


@dataclass(slots=True)
class Track:
    """One contender's namespaces; `next_source` is the first address no connection has had."""

    client: Member
    server: Member
    outside: Member
    nodes: tuple[Member, Member]
    next_source: IPv4Address = field(default=SOURCES[2])

    def take_sources(self, count: int) -> None:
        """Note that `count` more source addresses are used up; begins anew at the end."""
        self.next_source += count
        if self.next_source not in SOURCES or self.next_source > SOURCES[-(1 << 20)]:
            self.next_source = SOURCES[2]


@contextmanager
def laid_track(load: Path) -> Iterator[Track]:
    """Make the namespaces, capture both pods' traffic, and run the servers (`load serve`).

    Raises:
        OSError: a privilege is missing.
    """
    with ExitStack() as undo:
        members = {name: _member(name, undo) for name in ("client", "server", "outside", "a", "b")}
        client, server, outside = members["client"], members["server"], members["outside"]
        _join(client, _ETH0, CLIENT_IP, server, SERVER_IP)
        _join(client, _ETH1, CLIENT_IP, outside, OUTSIDE_IP)
        client.links.address(LOOPBACK_INDEX, SOURCES[1], SOURCES.prefixlen)
        client.links.route(PLAIN, _ETH1, via=OUTSIDE_IP, source=CLIENT_IP)
        client.links.commit()
        outside.links.address(LOOPBACK_INDEX, PLAIN[1], PLAIN.prefixlen)
        outside.links.commit()
        for pod in (client, server):
            apply_redirect(pod.netns, RedirectPlan())
        for host in (server, outside):
            program = host.popen(str(load), "serve", str(APP_PORT))
            undo.callback(_end, program)
        yield Track(client, server, outside, (members["a"], members["b"]))


def _member(name: str, undo: ExitStack) -> Member:
    space = new_namespace()
    undo.callback(space.close)
    space.call(_set_up)
    links = Links(space)
    undo.callback(links.close)
    links.up(LOOPBACK_INDEX)
    links.commit()
    return Member(name, space, (), links)


def _set_up() -> None:
    for name, value in SETTINGS.items():
        Path("/proc/sys", name).write_text(value)


def _join(one: Member, index: int, ip: IPv4Address, other: Member, other_ip: IPv4Address) -> None:
    one.links.veth(index, f"eth{index}", peer=other.netns, peer_index=_ETH0, peer_name="eth0")
    one.links.commit()
    other.links.up(_ETH0)
    other.links.commit()
    one.links.wait_running(index)
    for member, at, own, far in ((one, index, ip, other_ip), (other, _ETH0, other_ip, ip)):
        member.links.address(at, own, 32)
        member.links.route(IPv4Network(far), at, source=own)
        member.links.commit()


def _end(program: subprocess.Popen[bytes]) -> None:
    program.kill()
    program.communicate()
