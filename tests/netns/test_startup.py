"""What an operator sees when the node proxy cannot start: one clear message, status 1."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ztunnel.devmesh.cluster import Cluster, Node

pytestmark = pytest.mark.netns

GOOD = {"FAKE_CA": "true", "XDS_ADDRESS": "", "NODE_NAME": "node-a"}


def start(node: Node, drop: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the proxy on a node of its own; it is expected to give up."""
    words = node.command(sys.executable, "-m", "ztunnel", "proxy", "ztunnel")
    if drop:
        words = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *words]
    env = {"PATH": os.environ["PATH"], **GOOD, **settings}
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def node() -> object:
    with Cluster(f"zs{os.getpid()}") as cluster:
        yield cluster.add_node("node-a")


def test_every_bad_setting_is_named_at_once(node: Node) -> None:
    ended = start(node, IPV6_ENABLED="yes", KEEPALIVE_RETRIES="many", SECRET_TTL="soon")
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 3
    for name, value in (
        ("IPV6_ENABLED", "yes"),
        ("KEEPALIVE_RETRIES", "many"),
        ("SECRET_TTL", "soon"),
    ):
        assert any(f"invalid env var {name}={value} (" in line for line in lines)


def test_a_missing_static_file_is_named(node: Node, tmp_path: Path) -> None:
    ended = start(node, LOCAL_XDS_PATH=str(tmp_path / "gone.yaml"))
    assert ended.returncode == 1
    assert f"LOCAL_XDS_PATH={tmp_path / 'gone.yaml'}" in ended.stderr
    assert "No such file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_malformed_static_file_gives_line_and_field(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(
        "workloads: []\npolicies: []\nservices:\n- name: cart\n  namespace: shop\n"
        "  hostname: cart.shop\n  ports: {80: 8080}\n  vips: ['/not-an-address']\n"
    )
    ended = start(node, LOCAL_XDS_PATH=str(path))
    assert ended.returncode == 1
    assert "services[0].vips[0]" in ended.stderr
    assert "line 8" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("port", "mend"),
    [(15000, "proxyAdminPort"), (15020, "statsPort"), (15021, "")],
)
def test_a_port_in_use_is_named(node: Node, port: int, mend: str) -> None:
    with node.netns.call(socket.socket) as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        ended = start(node)
    assert ended.returncode == 1
    assert f":{port}: Address already in use" in ended.stderr
    assert mend in ended.stderr
    assert "neither LOCAL_XDS_PATH nor LOCAL_XDS is set" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_in_dedicated_mode_a_taken_proxy_port_is_named(node: Node) -> None:
    with node.netns.call(socket.socket) as taken:
        taken.bind(("0.0.0.0", 15006))
        taken.listen()
        ended = start(node, PROXY_MODE="dedicated", PROXY_WORKLOAD_INFO="shop/cart/cart")
    assert ended.returncode == 1
    assert ":15006: Address already in use" in ended.stderr


def test_a_development_ca_that_cannot_be_read_is_named(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("not a certificate")
    ended = start(node, FAKE_CA=str(path))
    assert ended.returncode == 1
    assert f"FAKE_CA={path}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.requires_program("setpriv")
def test_a_missing_capability_is_named(node: Node) -> None:
    # Since Linux 5.17 either of the two is enough to mark packets.
    ended = start(node, drop="-net_admin,-net_raw")
    assert ended.returncode == 1
    assert "CAP_NET_ADMIN" in ended.stderr
    assert "PROXY_MODE=dedicated" in ended.stderr
