"""Nodes, pods and outside hosts made of network namespaces; needs root.

How it works: each member is a namespace that only we hold. A pod's `eth0` is a cable to its node,
which routes (no bridge: a bridge that gets its first port is deaf for up to a second). A node's
`uplink` (an outside host's `eth0`) is a cable to the bridge of one more namespace, the fabric.
Every address is a host route, so pods may have any address: a pod sends everything to its node,
and every node knows on which node each pod is. Nothing is ever made in the namespace we were
started in, and namespaces without a name die with their last holder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

from ztunnel.devmesh import exec_in
from ztunnel.devmesh.links import LOOPBACK_INDEX, Links
from ztunnel.linux import netns
from ztunnel.linux.closing import Closing
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress

NAMES_FOLDER = Path("/run/netns")  # where `ip netns exec` looks

# Invisible to pods and hosts: what nodes call each other, and what pods call their node.
FABRIC_NETWORKS = (ip_network("172.30.0.0/16"), ip_network("fd00:30::/64"))
GATEWAYS = (ip_address("169.254.1.1"), ip_address("fe80::1"))
_EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))

_BRIDGE_INDEX = 2  # in the fabric
_ETH0_INDEX = 3  # also a node's uplink
_FIRST_PORT_INDEX = 10

_EVERYONE = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
_ROUTERS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}


@dataclass(eq=False, slots=True)
class Member:
    """A namespace with a name; the addresses are those others reach it by, IPv4 first."""

    name: str
    netns: PodNetns
    addresses: tuple[IpAddress, ...]
    links: Links = field(repr=False)

    def command(self, *words: str) -> list[str]:
        """Make the command line that runs a program inside, while this process lives."""
        path = f"/proc/{os.getpid()}/fd/{self.netns.fileno()}"
        return [sys.executable, "-I", "-S", exec_in.__file__, path, *words]

    def popen(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a program inside; the caller ends it."""
        return subprocess.Popen(
            self.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )


@dataclass(eq=False, slots=True)
class Node(Member):
    """A router with a cable to each of its pods."""

    next_port: int = _FIRST_PORT_INDEX


@dataclass(eq=False, slots=True, kw_only=True)
class Pod(Member):
    """What runs on a node; its interface is `eth0`."""

    node: Node
    port: int


class Cluster(Closing):
    """A handful of machines. Use as a context manager, or call `close`.

    `prefix` tells clusters apart; with `keep` members are named `<prefix>-<name>` under
    `/run/netns` while the cluster exists, and `sweep` removes what a killed run left of that.
    """

    def __init__(self, prefix: str = "mesh", *, keep: bool = False) -> None:
        """Make the fabric.

        Raises:
            OSError: CAP_SYS_ADMIN is missing, or with `keep` the prefix is in use.
        """
        self._prefix = prefix
        self._keep = keep
        self._undo = ExitStack()
        self._hosts: list[Member] = []  # nodes and outside hosts: the neighbours on the fabric
        self._pods: list[Pod] = []
        self._names: set[str] = set()
        self._next_port = _FIRST_PORT_INDEX
        try:
            self._fabric = self._member("fabric", ())
            self._fabric.links.bridge(_BRIDGE_INDEX, "fabric0")
            self._fabric.links.up(_BRIDGE_INDEX)
            self._fabric.links.commit()
        except BaseException:
            self._undo.close()
            raise

    def add_node(self, name: str) -> Node:
        """Make a node; its addresses are in `FABRIC_NETWORKS`.

        Raises:
            ValueError: the name is taken.
            OSError: the kernel refused something.
        """
        addresses = tuple(network[len(self._hosts) + 1] for network in FABRIC_NETWORKS)
        member = self._member(name, addresses, _ROUTERS)
        node = Node(member.name, member.netns, member.addresses, member.links)
        self._join_fabric(node, "uplink")
        return node

    def add_outside(self, name: str, ipv4: str, ipv6: str | None = None) -> Member:
        """Make a host that is on no node; pods and it reach each other.

        Raises:
            ValueError: the name is taken, or an address is none.
            OSError: the kernel refused something.
        """
        host = self._member(name, _addresses(ipv4, ipv6))
        self._join_fabric(host, "eth0")
        return host

    def add_pod(self, node: Node, name: str, ipv4: str, ipv6: str | None = None) -> Pod:
        """Make a pod.

        Raises:
            ValueError: the name is taken, or an address is none.
            OSError: the kernel refused something.
        """
        member = self._member(name, _addresses(ipv4, ipv6))
        pod = Pod(
            member.name,
            member.netns,
            member.addresses,
            member.links,
            node=node,
            port=node.next_port,
        )
        node.next_port += 1
        node.links.veth(
            pod.port,
            f"pod{pod.port}",
            peer=pod.netns,
            peer_index=_ETH0_INDEX,
            peer_name="eth0",
        )
        for gateway, length in zip(GATEWAYS, (32, 64), strict=True):
            node.links.address(pod.port, gateway, length)
        node.links.commit()
        pod.links.up(_ETH0_INDEX)
        for ip, gateway, everywhere in zip(pod.addresses, GATEWAYS, _EVERYWHERE, strict=False):
            pod.links.address(_ETH0_INDEX, ip, ip.max_prefixlen)
            pod.links.route(everywhere, _ETH0_INDEX, via=gateway, source=ip)
            node.links.route(ip_network(ip), pod.port)
        pod.links.commit()
        node.links.commit()
        node.links.wait_running(pod.port)
        self._pods.append(pod)
        for host in self._hosts:
            _route_to_pod(host, pod)
            host.links.commit()
        return pod

    def remove_pod(self, pod: Pod) -> None:
        """Remove a pod as the container runtime would: cable and routes, then the namespace.

        Raises:
            OSError: the kernel refused something.
        """
        self._pods.remove(pod)
        self._names.discard(pod.name)
        pod.node.links.delete(pod.port)  # and with it the routes over it
        pod.node.links.commit()
        for host in self._hosts:
            if host is not pod.node:
                for ip, _ in zip(pod.addresses, host.addresses, strict=False):
                    host.links.no_route(ip_network(ip), _ETH0_INDEX)
                host.links.commit()
        self._forget(pod)

    def close(self) -> None:
        """Remove everything; more than once is fine."""
        self._undo.close()

    def _member(
        self, name: str, addresses: tuple[IpAddress, ...], settings: dict[str, str] | None = None
    ) -> Member:
        if name in self._names or not name or "/" in name:
            raise ValueError(f"a member needs a name of its own, not {name!r}")
        space = new_namespace()
        self._undo.callback(space.close)
        if self._keep:
            self._pin(name, space)
        space.call(lambda: _set({**_EVERYONE, **(settings or {})}))
        links = Links(space)
        self._undo.callback(links.close)
        links.up(LOOPBACK_INDEX)
        self._names.add(name)
        return Member(name, space, addresses, links)

    def _pin(self, name: str, space: PodNetns) -> None:
        NAMES_FOLDER.mkdir(parents=True, exist_ok=True)
        path = NAMES_FOLDER / f"{self._prefix}-{name}"
        netns.pin(space.fileno(), path)
        self._undo.callback(netns.unpin, path)

    def _forget(self, member: Member) -> None:
        if self._keep:
            netns.unpin(NAMES_FOLDER / f"{self._prefix}-{member.name}")
        member.links.close()
        member.netns.close()

    def _join_fabric(self, host: Member, interface: str) -> None:
        port, self._next_port = self._next_port, self._next_port + 1
        self._fabric.links.veth(
            port,
            f"port{port}",
            peer=host.netns,
            peer_index=_ETH0_INDEX,
            peer_name=interface,
            bridge=_BRIDGE_INDEX,
        )
        self._fabric.links.commit()
        host.links.up(_ETH0_INDEX)
        for ip in host.addresses:
            host.links.address(_ETH0_INDEX, ip, ip.max_prefixlen)
        host.links.commit()
        self._fabric.links.wait_running(port)
        for other in self._hosts:
            _route_to_neighbour(host, other)
            _route_to_neighbour(other, host)
            other.links.commit()
        self._hosts.append(host)
        for pod in self._pods:
            _route_to_pod(host, pod)
        host.links.commit()


def new_namespace() -> PodNetns:
    """Make an empty namespace that nobody is in and only the caller holds.

    Raises:
        OSError: CAP_SYS_ADMIN is missing.
    """
    made: list[PodNetns | OSError] = []

    def make() -> None:
        # In a thread that ends here: whatever enters a new namespace this way stays in it.
        try:
            netns.leave_for_new()
            made.append(PodNetns.open("/proc/thread-self/ns/net"))
        except OSError as exc:
            made.append(exc)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    match made:
        case [PodNetns() as space]:
            return space
        case [OSError() as error]:
            raise error
        case _:
            raise AssertionError("the thread ended without an outcome")


def sweep(prefix: str) -> list[str]:
    """Remove the names that a killed run with `keep` left; returns them.

    Raises:
        OSError: a privilege is missing.
    """
    left = sorted(NAMES_FOLDER.glob(f"{prefix}-*"))
    for path in left:
        netns.unpin(path)
    return [path.name for path in left]


def _set(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        Path("/proc/sys", name).write_text(value)


def _addresses(ipv4: str, ipv6: str | None) -> tuple[IpAddress, ...]:
    return tuple(ip_address(text) for text in (ipv4, ipv6) if text)


def _route_to_neighbour(host: Member, other: Member) -> None:
    for ip, own in zip(other.addresses, host.addresses, strict=False):
        host.links.route(ip_network(ip), _ETH0_INDEX, source=own)


def _route_to_pod(host: Member, pod: Pod) -> None:
    if host is pod.node:
        return
    for ip, own, via in zip(pod.addresses, host.addresses, pod.node.addresses, strict=False):
        host.links.route(ip_network(ip), _ETH0_INDEX, via=via, source=own)
