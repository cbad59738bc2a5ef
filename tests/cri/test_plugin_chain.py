"""The plugin in the chain of a real containerd, put there by our installer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("cri_api")

import grpc

from cni.install.bundle import LAUNCHER, VERSIONS
from cni.install.hostpath import host_path_of
from cni.install.installer import NodeFiles
from cni.install.settings import InstallSettings
from cni.plugin.journal import FILE_NAME, SOCKET_NAME
from tests.support.cri import Containerd, running_containerd
from tests.support.cri_generations import GENERATIONS
from tests.support.namespaces import needs_root
from tests.support.plugin_agent import StandInAgent

pytestmark = [
    pytest.mark.cri,
    pytest.mark.netns,
    pytest.mark.requires_program("containerd", "runc", "nsenter", "ip", "/usr/lib/cni/ptp"),
    pytest.mark.timeout(180),
    needs_root,
]

CHAIN_NAME = "10-pods.conflist"


@dataclass(frozen=True)
class Node:
    """A node with a runtime, our plugin in its chain, and no agent unless a test starts one."""

    containerd: Containerd
    files: NodeFiles
    run_dir: Path

    def log(self) -> list[dict[str, str]]:
        path = self.run_dir / FILE_NAME
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def addresses_in_use(self) -> set[str]:
        """Name the addresses that the primary plugin has given out."""
        folder = self.containerd.folder / "ipam" / "pods"
        return {path.name for path in folder.glob("10.*")}


def settings(containerd: Containerd, run_dir: Path) -> InstallSettings:
    return InstallSettings.from_env(
        {
            "MOUNTED_CNI_NET_DIR": str(containerd.confs),
            "MOUNTED_CNI_BIN_DIR": str(containerd.plugins),
            "CNI_BIN_DIR": str(containerd.plugins),
            "CNI_AGENT_RUN_DIR": str(run_dir),
            "AMBIENT_ENABLED": "true",
            "EXCLUDE_NAMESPACES": "kube-system",
            "POD_NAMESPACE": "istio-system",
            "PLUGIN_LOG_LEVEL": "debug",
        }
    )


def posted_lines(log: StandInAgent) -> list[str]:
    """Give what plugins have sent to the agent's log."""
    posted = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in log.requests]
    return [line for lines in posted for line in lines]


@pytest.fixture(scope="module", params=GENERATIONS)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with running_containerd(request.param) as containerd:
        run_dir = containerd.folder / "run"
        run_dir.mkdir()
        files = NodeFiles(settings(containerd, run_dir))
        # The agent comes before the primary plugin: the chain is joined when it appears.
        assert files.install().waiting_for != ""
        (containerd.confs / CHAIN_NAME).write_bytes(containerd.primary())
        files.install()
        containerd.wait_for_chain("istio-cni")
        yield Node(containerd, files, run_dir)


@pytest.fixture
def agent(node: Node) -> Iterator[StandInAgent]:
    with StandInAgent(node.run_dir) as agent:
        yield agent


def test_the_agent_hears_of_a_pod_before_its_containers_run(
    node: Node, agent: StandInAgent
) -> None:
    pod = node.containerd.run_pod("cart-0", namespace="shop")
    (event,) = agent.bodies
    assert (event["PodNamespace"], event["PodName"]) == ("shop", "cart-0")
    assert (event["PodUID"], event["ContainerID"]) == (pod.uid, pod.id)
    assert event["Netns"] == pod.netns
    (address,) = event["IPs"]  # type: ignore[misc]
    assert address["Address"] == {"IP": pod.ip, "Mask": "////AA=="}
    # The descriptor that came along is the pod's namespace and no other.
    netns = Path(pod.netns).stat()
    assert [(fd.st_dev, fd.st_ino) for fd in agent.descriptors] == [(netns.st_dev, netns.st_ino)]
    assert f"{pod.ip}/" in node.containerd.run(pod, "ip", "addr", "show", "eth0")
    node.containerd.remove(pod)


def test_a_pod_that_is_refused_does_not_start_and_the_kubelet_learns_why(
    node: Node, agent: StandInAgent
) -> None:
    before = node.addresses_in_use()
    agent.refuse(500, "no proxy is connected")
    with pytest.raises(grpc.RpcError) as caught:
        node.containerd.run_pod("cart-1", namespace="shop")
    assert 'type="istio-cni"' in str(caught.value)
    assert "failed (add): node agent answers 500; no proxy is connected" in str(caught.value)
    assert node.containerd.pods() == []
    assert node.addresses_in_use() == before


def test_without_an_agent_pods_wait_except_those_it_does_not_concern(node: Node) -> None:
    with pytest.raises(grpc.RpcError, match="node agent does not answer"):
        node.containerd.run_pod("cart-2", namespace="shop")
    assert node.log()[-1]["level"] == "error"
    for namespace, name in (("kube-system", "dns"), ("istio-system", "istio-cni-node-x7f2p")):
        pod = node.containerd.run_pod(name, namespace=namespace)
        assert pod.ip.startswith("10.233.77.")
        node.containerd.remove(pod)


def test_deleting_asks_nobody_and_may_be_done_again(node: Node, agent: StandInAgent) -> None:
    pod = node.containerd.run_pod("cart-3", namespace="shop")
    with StandInAgent(node.run_dir, socket_name=SOCKET_NAME) as log:
        agent.refuse(500, "nobody asks me")
        node.containerd.stop(pod)
        node.containerd.stop(pod)
        node.containerd.remove(pod)
        lines = [json.loads(line) for line in posted_lines(log)]
    assert {line["command"] for line in lines} == {"DEL"}
    # The last one comes without the namespace, which is gone.
    assert lines[0]["netns"] == pod.netns
    assert lines[-1]["netns"] == ""
    assert len(agent.requests) == 1
    assert node.addresses_in_use() == set()


def test_a_missing_agent_does_not_make_the_whole_network_unready(node: Node) -> None:
    """From CNI 1.1.0 on the runtime asks each plugin of the chain for its status."""
    generation = node.containerd.generation
    with StandInAgent(node.run_dir, socket_name=SOCKET_NAME) as log:
        assert node.containerd.network_is_ready()
        commands = {json.loads(line)["command"] for line in posted_lines(log)}
    assert commands == ({"STATUS"} if generation.spec == "1.1.0" else set())
    pod = node.containerd.run_pod("dns", namespace="kube-system")
    node.containerd.remove(pod)


def test_garbage_collection_by_the_chain_s_rules_is_fine_with_us(node: Node) -> None:
    """No containerd calls it so far; as libcni does, with the networks that are still in use."""
    chain = json.loads((node.containerd.confs / CHAIN_NAME).read_bytes())
    for plugin in chain["plugins"]:
        conf = {**plugin, "name": chain["name"], "cniVersion": "1.1.0"}
        done = subprocess.run(
            [node.containerd.plugins / plugin["type"]],
            input=json.dumps({**conf, "cni.dev/valid-attachments": []}).encode(),
            env={"CNI_COMMAND": "GC", "CNI_PATH": str(node.containerd.plugins)},
            capture_output=True,
            check=False,
        )
        knows = plugin["type"] == "istio-cni" or node.containerd.generation.spec == "1.1.0"
        assert done.returncode == (0 if knows else 1), done.stdout
        assert not done.stdout or not knows


def test_an_upgrade_and_an_uninstallation_go_unnoticed_by_running_pods(
    node: Node, agent: StandInAgent
) -> None:
    pod = node.containerd.run_pod("cart-4", namespace="shop")
    old = {path.name for path in (node.containerd.plugins / VERSIONS).iterdir()}
    # Damaged on purpose: laid down anew, as another version would be.
    for version in old:
        (node.containerd.plugins / VERSIONS / version / "MANIFEST").unlink()
    assert "plugin" in node.files.install().changed
    second = node.containerd.run_pod("cart-5", namespace="shop")
    before = node.containerd.primary()
    try:
        node.files.uninstall()
        assert (node.containerd.confs / CHAIN_NAME).read_bytes() == before
        assert not (node.containerd.plugins / LAUNCHER).exists()
        node.containerd.wait_for_chain()
        node.containerd.remove(pod)
        node.containerd.remove(second)
        third = node.containerd.run_pod("cart-6", namespace="shop")
        assert len(agent.requests) == 2
        node.containerd.remove(third)
    finally:
        node.files.install()
        node.containerd.wait_for_chain("istio-cni")


def test_a_container_finds_out_where_the_host_has_its_folder(node: Node) -> None:
    pod = node.containerd.run_pod("agent", namespace="kube-system")
    folder = "/host/opt/cni/bin"
    own = node.containerd.run(
        pod, "cat", "/proc/self/mountinfo", mounts={folder: node.containerd.plugins}
    )
    host = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    assert Path(host_path_of(folder, own=own, host=host)) == node.containerd.plugins
    node.containerd.remove(pod)
