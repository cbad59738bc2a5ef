from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cni.agent.errors import NetnsError
from cni.agent.pod_netns import NodeView, addresses_in, is_network_namespace, start_time
from tests.support.kube import FakeProc
from tests.support.namespaces import needs_root, open_descriptors
from ztunnel.devmesh.cluster import Cluster, Pod
from ztunnel.linux.netns import NetnsId, PodNetns
from ztunnel.model.network import parse_ip
from ztunnel.model.workload import PodUid

UID = PodUid("11111111-2222-3333-4444-555555555555")
IP, OTHER_IP = parse_ip("10.1.0.1"), parse_ip("10.1.0.2")
NOBODY = NetnsId(0, 0)


def test_the_start_time_is_read_whatever_the_process_is_called() -> None:
    fields = " ".join(["S", *["0"] * 18, "4711", "0"])
    assert start_time(f"1 (a) b) (c)) {fields}") == 4711
    assert start_time(Path("/proc/self/stat").read_text()) > 0


@given(st.text())
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a process|invalid literal"):
        start_time(text)


def test_a_network_namespace_is_told_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for path, wanted in (
        ("/proc/self/ns/net", True),
        ("/proc/self/ns/mnt", False),
        (tmp_path / "f", False),
    ):
        with PodNetns.open(path) as netns:
            assert is_network_namespace(netns.fileno()) is wanted


@pytest.mark.parametrize("path", ["", "/", "../etc", "/var/../etc/passwd", "/a\0b", "/missing"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, path: str) -> None:
    view = NodeView(Path("/proc"), (tmp_path,), NOBODY)
    with pytest.raises(NetnsError):
        view.open_reported(path)


def test_a_path_is_looked_for_in_each_root(tmp_path: Path) -> None:
    (tmp_path / "b/var").mkdir(parents=True)
    (tmp_path / "b/var/x").touch()
    view = NodeView(Path("/proc"), (tmp_path / "a", tmp_path / "b"), NOBODY)
    view.open_reported("/var/x").close()


def test_the_hosts_own_namespace_is_refused() -> None:
    with PodNetns.open("/proc/self/ns/net") as netns:
        view = NodeView(Path("/proc"), (Path("/"),), netns.id)
        with pytest.raises(NetnsError, match="host's own"):
            view.check(netns, ())


def test_what_is_no_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    view = NodeView(Path("/proc"), (Path("/"),), NOBODY)
    with (
        PodNetns.open(tmp_path / "f") as netns,
        pytest.raises(NetnsError, match="not a network namespace"),
    ):
        view.check(netns, ())


class Scene:
    """Two pods of one node, and its processes."""

    def __init__(self, cluster: Cluster, proc: FakeProc) -> None:
        node = cluster.add_node("node")
        self.pod: Pod = cluster.add_pod(node, "pod", str(IP), "fd00::1")
        self.other: Pod = cluster.add_pod(node, "other", str(OTHER_IP))
        self.proc = proc
        self.view = NodeView(proc.root, (Path("/"),), node.netns.id)
        self.node = node

    def found(self, *ips: object) -> NetnsId | None:
        """Which namespace is found for the pod."""
        found = self.view.find({UID: ips or (IP,)})  # type: ignore[dict-item]
        netns = found.get(UID)
        if netns is None:
            return None
        netns.close()
        return netns.id


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Cluster() as cluster:
        scene = Scene(cluster, FakeProc(tmp_path / "proc"))
        scene.proc.root.mkdir()
        before = open_descriptors()
        yield scene
        assert open_descriptors() == before


@pytest.mark.netns
@needs_root
class TestWithNamespaces:
    def test_a_pods_process_leads_to_its_namespace(self, scene: Scene) -> None:
        scene.proc.add(UID, scene.pod.netns)
        assert scene.found() == scene.pod.netns.id
        assert scene.found(parse_ip("fd00::1")) == scene.pod.netns.id

    def test_of_two_namespaces_the_one_of_the_oldest_process_counts(self, scene: Scene) -> None:
        young = scene.proc.add(UID, scene.other.netns, started=9)
        scene.proc.add(UID, scene.pod.netns, started=3)
        scene.proc.add(UID, scene.other.netns, started=5)
        assert scene.found(IP, OTHER_IP) == scene.pod.netns.id
        shutil.rmtree(young)
        assert scene.found(IP, OTHER_IP) == scene.pod.netns.id

    def test_a_process_in_a_namespace_without_the_pods_address_is_not_followed(
        self, scene: Scene
    ) -> None:
        scene.proc.add(UID, scene.other.netns, started=1)
        scene.proc.add(UID, scene.other.netns, started=2)
        assert scene.found() is None
        scene.proc.add(UID, scene.pod.netns, started=9)
        assert scene.found() == scene.pod.netns.id

    def test_processes_of_the_host_and_of_other_pods_do_not_matter(self, scene: Scene) -> None:
        scene.proc.add(UID, scene.node.netns)
        scene.proc.add(UID.replace("1", "9"), scene.pod.netns)
        scene.proc.add_raw("0::/system.slice/x.service", scene.pod.netns.fileno())
        assert scene.found() is None

    def test_processes_that_end_while_we_look_do_not_matter(self, scene: Scene) -> None:
        for name in ("ns", "cgroup", "stat"):
            folder = scene.proc.add(UID, scene.pod.netns)
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (scene.proc.add(UID, scene.pod.netns) / "stat").write_text("?")
        assert scene.found() is None

    @pytest.mark.parametrize("where", ["pod", "other", "host", "nowhere"])
    def test_what_the_runtime_says_counts_if_it_can_be_true(self, scene: Scene, where: str) -> None:
        spaces = {"pod": scene.pod.netns, "other": scene.other.netns, "host": scene.node.netns}
        path = f"/proc/{os.getpid()}/fd/{spaces[where].fileno()}" if where in spaces else "/nowhere"
        found, problems = scene.view.open_sandboxes({UID: path}, {UID: (IP,)})
        assert [netns.id for netns in found.values()] == (
            [scene.pod.netns.id] if where == "pod" else []
        )
        assert len(problems) == (0 if where == "pod" else 1)
        for netns in found.values():
            netns.close()

    def test_without_an_address_nothing_is_found(self, scene: Scene) -> None:
        scene.proc.add(UID, scene.pod.netns)
        assert scene.view.find({UID: ()}) == {}

    def test_without_processes_nothing_is_found(self, tmp_path: Path) -> None:
        assert NodeView(tmp_path / "none", (), NOBODY).find({UID: (IP,)}) == {}

    def test_a_foreign_namespace_is_refused(self, scene: Scene) -> None:
        scene.view.check(scene.pod.netns, (IP,))
        scene.view.check(scene.pod.netns, ())
        with pytest.raises(NetnsError, match=r"none of the pod's addresses 10\.1\.0\.1"):
            scene.view.check(scene.other.netns, (IP,))

    def test_a_namespaces_addresses_are_read(self, scene: Scene) -> None:
        addresses = addresses_in(scene.pod.netns)
        assert {IP, parse_ip("fd00::1"), parse_ip("127.0.0.1")} <= addresses

    def test_a_namespace_is_opened_by_the_path_the_runtime_reports(self, scene: Scene) -> None:
        path = f"/proc/{os.getpid()}/fd/{scene.pod.netns.fileno()}"
        with scene.view.open_reported(path) as netns:
            assert netns.id == scene.pod.netns.id
