from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address, ip_network

import pytest

from tests.support.namespaces import needs_root
from ztunnel.devmesh import links as links_module
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.devmesh.links import LOOPBACK_INDEX, Links
from ztunnel.linux.netns import PodNetns

pytestmark = [pytest.mark.netns, needs_root]


@pytest.fixture
def space() -> Iterator[PodNetns]:
    with new_namespace() as space:
        yield space


@pytest.fixture
def links(space: PodNetns) -> Iterator[Links]:
    with closing(Links(space)) as links:
        links.up(LOOPBACK_INDEX)
        links.commit()
        yield links


def names(space: PodNetns) -> dict[int, str]:
    return dict(space.call(socket.if_nameindex))


def reaches(space: PodNetns, host: str) -> bool:
    """Whether there is a route to a host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with space.call(lambda: socket.socket(family, socket.SOCK_DGRAM)) as sock:
        try:
            sock.connect((host, 9))
        except OSError:
            return False
        return True


def test_nothing_happens_before_commit(space: PodNetns, links: Links) -> None:
    links.bridge(2, "br0")
    assert names(space) == {1: "lo"}
    links.commit()
    assert names(space) == {1: "lo", 2: "br0"}
    links.commit()


def test_a_cable_joins_a_bridge_and_another_namespace(space: PodNetns, links: Links) -> None:
    with new_namespace() as other:
        links.bridge(2, "br0")
        links.veth(10, "port", peer=other, peer_index=3, peer_name="eth0", bridge=2)
        links.commit()
        assert names(space) == {1: "lo", 2: "br0", 10: "port"}
        assert names(other) == {1: "lo", 3: "eth0"}
        links.delete(10)
        links.commit()
        assert names(other) == {1: "lo"}


@pytest.mark.parametrize(
    ("address", "prefix", "target", "gateway"),
    [
        ("10.0.0.1", 32, "192.0.2.1", "10.9.9.9"),
        ("fd00::1", 128, "2001:db8::1", "fe80::9"),
    ],
    ids=["ipv4", "ipv6"],
)
def test_addresses_and_routes_work_at_once_and_can_be_removed(
    space: PodNetns, links: Links, address: str, prefix: int, target: str, gateway: str
) -> None:
    network = ip_network(f"{target}/{prefix}")
    links.bridge(2, "br0")
    links.up(2)
    links.address(2, ip_address(address), prefix)
    links.commit()
    with space.call(
        lambda: socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    ) as sock:
        sock.bind((address, 0))
    assert not reaches(space, target)
    links.route(network, 2, via=ip_address(gateway), source=ip_address(address))
    links.commit()
    assert reaches(space, target)
    links.no_route(network, 2)
    links.commit()
    assert not reaches(space, target)
    links.route(network, 2)
    links.commit()
    assert reaches(space, target)


def test_a_cable_is_ready_when_both_ends_are_up(links: Links) -> None:
    with new_namespace() as other, closing(Links(other)) as far:
        links.veth(10, "port", peer=other, peer_index=3, peer_name="eth0")
        links.commit()
        far.up(3)
        far.commit()
        links.wait_running(10)
        far.wait_running(3)


def test_a_cable_with_one_end_down_does_not_get_ready(
    links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "_RUNNING_SECONDS", 0.05)
    with new_namespace() as other:
        links.veth(10, "port", peer=other, peer_index=3, peer_name="eth0")
        links.commit()
        with pytest.raises(TimeoutError, match="interface 10 does not get ready"):
            links.wait_running(10)


def test_a_refused_change_is_named(links: Links) -> None:
    links.up(LOOPBACK_INDEX)
    links.delete(77)
    with pytest.raises(OSError, match="delete interface 77: No such device"):
        links.commit()
