from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespaces import (
    accept,
    connect,
    echoed,
    listen,
    needs_root,
    open_descriptors,
    output_of,
)
from ztunnel.devmesh import cluster as cluster_module
from ztunnel.devmesh.cluster import Cluster, Member, Pod, new_namespace, sweep
from ztunnel.linux import netns
from ztunnel.model.network import Endpoint

pytestmark = [pytest.mark.netns, needs_root]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    before = (socket.if_nameindex(), netns.current(), open_descriptors())
    with Cluster() as cluster:
        yield cluster
    assert (socket.if_nameindex(), netns.current(), open_descriptors()) == before


def assert_reaches(one: Member, other: Member, *, families: int = 2) -> None:
    for source, target in list(zip(one.addresses, other.addresses, strict=False))[:families]:
        with (
            listen(other.netns, 8080, host="::" if families == 2 else "0.0.0.0") as listener,
            connect(one.netns, str(target), 8080) as client,
            accept(listener) as server,
        ):
            assert Endpoint.of(server.getpeername()).ip == source
            assert echoed(client, server)


def test_everybody_reaches_everybody_by_both_families(cluster: Cluster) -> None:
    east, west = cluster.add_node("east"), cluster.add_node("west")
    pods = [
        cluster.add_pod(east, "a", "10.1.0.1", "fd00:1::1"),
        cluster.add_pod(east, "b", "10.1.0.2", "fd00:1::2"),
        cluster.add_pod(west, "c", "192.168.7.7", "2001:db8:7::7"),
    ]
    outside = cluster.add_outside("outside", "203.0.113.5", "2001:db8::5")
    late = cluster.add_pod(cluster.add_node("late node"), "d", "10.3.0.1", "fd00:3::1")
    everybody: list[Member] = [*pods, outside, late, east, west]
    for one in everybody:
        for other in everybody:
            if one is not other and isinstance(one, Pod):
                assert_reaches(one, other)
    assert_reaches(outside, late)


def test_a_pod_may_have_ipv4_only(cluster: Cluster) -> None:
    node = cluster.add_node("node")
    one = cluster.add_pod(node, "one", "10.1.0.1")
    other = cluster.add_pod(node, "other", "10.1.0.2")
    assert_reaches(one, other, families=1)


def test_a_removed_pods_address_can_move_to_another_node(cluster: Cluster) -> None:
    east, west = cluster.add_node("east"), cluster.add_node("west")
    client = cluster.add_pod(east, "client", "10.1.0.1", "fd00:1::1")
    first = cluster.add_pod(east, "moving", "10.1.0.9", "fd00:1::9")
    assert_reaches(client, first)
    cluster.remove_pod(first)
    with pytest.raises(OSError, match="unreachable"):
        connect(east.netns, "fd00:1::9", 8080)
    assert_reaches(client, cluster.add_pod(west, "moving", "10.1.0.9", "fd00:1::9"))


def test_a_pod_goes_also_where_an_outside_host_knows_but_one_of_its_addresses(
    cluster: Cluster,
) -> None:
    outside = cluster.add_outside("outside", "203.0.113.5")
    pod = cluster.add_pod(cluster.add_node("node"), "pod", "10.1.0.1", "fd00:1::1")
    assert_reaches(outside, pod)
    cluster.remove_pod(pod)
    with pytest.raises(OSError, match="unreachable"):
        connect(outside.netns, "10.1.0.1", 8080)


def test_a_program_runs_in_its_pod(cluster: Cluster) -> None:
    pod = cluster.add_pod(cluster.add_node("node"), "pod", "10.1.0.1")
    assert output_of(pod, "readlink", "/proc/self/ns/net") == f"net:[{pod.netns.id.inode}]\n"
    with pod.popen("readlink", "/proc/self/ns/net") as process:
        assert process.stdout is not None
        assert process.stdout.read() == f"net:[{pod.netns.id.inode}]\n".encode()


@pytest.mark.parametrize("name", ["", "a/b", "node"])
def test_names_are_unique_file_names(cluster: Cluster, name: str) -> None:
    cluster.add_node("node")
    with pytest.raises(ValueError, match="a name of its own"):
        cluster.add_outside(name, "203.0.113.5")


def test_an_address_that_is_none_makes_no_pod(cluster: Cluster) -> None:
    node = cluster.add_node("node")
    with pytest.raises(ValueError, match="does not appear to be"):
        cluster.add_pod(node, "pod", "10.1.0.256")
    cluster.add_pod(node, "pod", "10.1.0.255")


def test_closing_twice_is_fine() -> None:
    before = open_descriptors()
    cluster = Cluster()
    cluster.add_node("node")
    cluster.close()
    cluster.close()
    assert open_descriptors() == before


@pytest.fixture
def names_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not the host's own: other tests, and whatever else runs here, look there.
    folder = tmp_path / "netns"
    monkeypatch.setattr(cluster_module, "NAMES_FOLDER", folder)
    yield folder
    sweep("mine")
    sweep("killed")


def test_kept_namespaces_have_names_while_the_cluster_exists(names_folder: Path) -> None:
    with Cluster("mine", keep=True) as cluster:
        node = cluster.add_node("node")
        pod = cluster.add_pod(node, "pod", "10.1.0.1")
        status = (names_folder / "mine-pod").stat()
        assert (status.st_ino, status.st_dev) == (pod.netns.id.inode, pod.netns.id.device)
        assert len(list(names_folder.iterdir())) == 3
        cluster.remove_pod(pod)
        assert not (names_folder / "mine-pod").exists()
    assert list(names_folder.iterdir()) == []


def test_names_in_use_are_not_taken_and_nothing_is_left(names_folder: Path) -> None:
    with Cluster("mine", keep=True):
        before = open_descriptors()
        with pytest.raises(FileExistsError):
            Cluster("mine", keep=True)
        assert open_descriptors() == before


def test_what_a_killed_run_left_is_swept(names_folder: Path) -> None:
    killed = """
import os, pathlib, sys
from ztunnel.devmesh import cluster
cluster.NAMES_FOLDER = pathlib.Path(sys.argv[1])
cluster.Cluster("killed", keep=True).add_node("node")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", killed, str(names_folder)], check=True)
    assert sweep("other") == []
    assert sweep("killed") == ["killed-fabric", "killed-node"]
    assert list(names_folder.iterdir()) == []


def test_a_new_namespace_has_only_loopback() -> None:
    with new_namespace() as space:
        assert space.call(socket.if_nameindex) == [(1, "lo")]
        assert space.id != netns.current()
