"""Plugin, installer, agent and proxy together, on two nodes with a real container runtime."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cri_api")

import grpc

from cni.redirect.apply import inspect_redirect
from cni.redirect.branch_eni import PROTOCOL, TO_POD_PREFERENCE
from cni.redirect.host import read_members
from cni.redirect.plan import PROBE_SOURCES, RedirectPlan
from tests.support.cri import wait_until
from tests.support.cri_generations import GENERATIONS
from tests.support.cri_node import APP, AppPod, CriNode, inodes_held
from tests.support.cri_world import Traffic, World, descriptors_of, running_world
from tests.support.namespaces import connect, needs_root
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import parse_ip

pytestmark = [
    pytest.mark.cri,
    pytest.mark.netns,
    pytest.mark.requires_program(
        "containerd", "runc", "nsenter", "ip", "nft", "ss", "/usr/lib/cni/ptp"
    ),
    pytest.mark.timeout(180),
    needs_root,
]

IDENTITY = "spiffe://cluster.local/ns/shop/sa"


@pytest.fixture(scope="module", params=GENERATIONS)
def whole_world(request: pytest.FixtureRequest) -> Iterator[World]:
    with running_world(request.param) as world:
        yield world


@pytest.fixture
def world(whole_world: World) -> Iterator[World]:
    yield whole_world
    whole_world.a.show()  # pytest keeps it for itself unless the test failed
    whole_world.b.show()
    whole_world.forget_all()


def identities(source: AppPod, target: AppPod, *, family: int = 0) -> list[str]:
    """What a line of the access log says of a call."""
    form = ("{}", "[{}]")[family]
    return [
        "connection complete",
        f"src.addr={form.format(source.pod.ips[family])}:",
        f'src.identity="{IDENTITY}/{source.name}"',
        f"dst.hbone_addr={form.format(target.pod.ips[family])}:8080",
        f'dst.identity="{IDENTITY}/{target.name}"',
    ]


def is_redirected(app: AppPod) -> bool:
    with PodNetns.open(app.pod.netns) as space:
        return inspect_redirect(space, RedirectPlan()) == []


def why_refused(node: CriNode, app: AppPod) -> str:
    """Try to start a pod that must not start yet."""
    with pytest.raises(grpc.RpcError) as caught:
        node.run_pod(app)
    return str(caught.value)


@pytest.mark.parametrize("place", ["a", "b"], ids=["across nodes", "on one node"])
def test_pods_talk_through_the_proxy_from_their_first_packet(world: World, place: str) -> None:
    bare = world.bare_connections()
    node: CriNode = getattr(world, place)
    client = world.pod(node, f"client-{place}")
    # As an init container, which is the first in the sandbox, and as the container after it.
    for family in (0, 1):
        assert world.say_hello(client, world.server, family=family) == (0, "hello")
        wanted = identities(client, world.server, family=family)
        node.wait_proxy_line('direction="outbound"', *wanted)
        world.b.wait_proxy_line('direction="inbound"', *wanted)
    assert world.bare_connections() == bare
    assert world.status(client) == "enabled"


def test_of_a_deleted_pod_nothing_is_left(world: World) -> None:
    assert world.a.proxy is not None
    processes = world.a.proxy.pid, world.a.agent_pid()
    counts = []
    # The first one leaves what is kept on purpose: the connection to the CA and the like.
    for _ in range(3):
        come_and_go(world, processes)
        counts.append([descriptors_of(pid) for pid in processes])
    wait_until(
        lambda: [descriptors_of(pid) for pid in processes] <= counts[0],
        f"descriptors to be as few as before: {counts}",
    )


def come_and_go(world: World, processes: tuple[int, ...]) -> None:
    """Have a pod that is deleted while it has a connection; wait until nothing of it is left."""
    node, client = world.a, world.pod(world.a, "client")
    inode, ip = Path(client.pod.netns).stat().st_ino, parse_ip(client.pod.ip)
    assert all(inode in inodes_held(pid) for pid in processes)
    assert read_members(node.netns)[ip] == client.uid
    with world.call(client, world.server) as call:
        assert call.is_answered()
        world.forget(client)
        wait_until(lambda: not any(inode in inodes_held(p) for p in processes), "its namespace")
        wait_until(lambda: ip not in read_members(node.netns), "its probe exemption")
    assert not Path(client.pod.netns).exists()


def test_a_label_takes_running_pods_out_and_in_again_under_traffic(world: World) -> None:
    client = world.pod(world.a, "client")
    pods = (client, world.server)
    with Traffic(client, world.server) as traffic:
        try:
            world.outside.do(lambda api: api.label("shop", None))
            wait_until(lambda: {world.status(pod) for pod in pods} == {None}, "release")
            wait_until(lambda: not world.a.sees_captured(world.server.pod.ip), "control plane")
            assert not any(map(is_redirected, pods))
            traffic.more()
            bare, tunnelled = world.bare_connections(), world.tunnels()
            traffic.more()
            assert world.bare_connections() > bare
        finally:
            world.outside.do(lambda api: api.label("shop", "ambient"))
        wait_until(lambda: {world.status(pod) for pod in pods} == {"enabled"}, "capture")
        wait_until(lambda: world.a.sees_captured(world.server.pod.ip), "control plane")
        traffic.more()
        bare = world.bare_connections()
        traffic.more()
        assert world.bare_connections() == bare
        assert world.tunnels() > tunnelled
        assert all(map(is_redirected, pods))


def test_kubelets_probes_need_no_proxy_and_nobody_else_gets_past_it(world: World) -> None:
    node, app = world.a, world.pod(world.a, "probed")
    world.serve(app)
    node.stop_proxy()
    try:
        for ip, disguise in zip(app.pod.ips, PROBE_SOURCES, strict=True):
            with connect(node.netns, ip, APP) as probe:
                probe.sendall(b"alive?")
                assert probe.recv(16) == b"alive?"
                inside = ("nsenter", f"--net={app.pod.netns}", "ss", "-tnH")
                assert str(disguise) in subprocess.check_output(inside, text=True)
            with pytest.raises(OSError, match="refused"):
                connect(world.b.netns, ip, APP).close()
    finally:
        node.start_proxy()
        node.wait_proxy()


def test_a_runtime_that_restarts_disturbs_nobody(world: World) -> None:
    node, client, bare = world.a, world.pod(world.a, "client"), world.bare_connections()
    with Traffic(client, world.server) as traffic, world.call(client, world.server) as call:
        node.restart_runtime()
        late = world.pod(node, "late")
        assert world.say_hello(late, world.server) == (0, "hello")
        traffic.more()
        assert call.is_answered()
    assert traffic.failures == []
    assert {world.status(client), world.status(late)} == {"enabled"}
    assert is_redirected(late)
    assert world.bare_connections() == bare


def test_a_running_pod_is_found_by_the_runtime_if_its_processes_do_not_say_whose_they_are(
    world: World,
) -> None:
    node, client = world.a, world.pod(world.a, "client", starts=False)
    world.outside.do(lambda api: api.set_mode("client", "none"))
    node.run_pod(client, group="anonymous")
    assert world.status(client) is None
    assert not is_redirected(client)
    world.outside.do(lambda api: api.set_mode("client", None))
    wait_until(lambda: world.status(client) == "enabled", "capture")
    assert world.say_hello(client, world.server) == (0, "hello")
    node.wait_proxy_line('direction="outbound"', *identities(client, world.server))


def test_connections_from_before_a_pod_is_taken_in_live_on_if_asked_to(world: World) -> None:
    node, client = world.a, world.pod(world.a, "client", starts=False)
    world.outside.do(lambda api: api.set_mode("client", "none"))
    world.start(client)
    node.stop_agent()
    node.settings["ZTUNNEL_CNI_KEEP_ESTABLISHED"] = "true"
    node.start_agent()
    node.wait_agent()
    try:
        with world.call(client, world.server) as call:
            assert call.is_answered()
            world.outside.do(lambda api: api.set_mode("client", None))
            wait_until(lambda: world.status(client) == "enabled", "capture")
            assert call.is_answered()
            assert world.say_hello(client, world.server) == (0, "hello")
            node.wait_proxy_line('direction="outbound"', *identities(client, world.server))
            assert call.is_answered()
    finally:
        node.stop_agent()
        node.settings.clear()
        node.start_agent()
        node.wait_agent()


def test_an_agent_that_is_replaced_disturbs_nobody(world: World) -> None:
    node, chain = world.a, world.a.chain()
    client, bare = world.pod(node, "client"), world.bare_connections()
    with Traffic(client, world.server) as traffic, world.call(client, world.server) as call:
        node.stop_agent()
        assert node.chain() == chain
        traffic.more()
        node.start_agent()
        node.wait_agent()
        traffic.more()
        assert call.is_answered()
    assert traffic.failures == []
    assert is_redirected(client)
    assert world.bare_connections() == bare


def test_while_an_agent_is_dead_pods_stay_captured_and_new_ones_wait(world: World) -> None:
    node, client = world.a, world.pod(world.a, "client")
    bare = world.bare_connections()
    with Traffic(client, world.server) as traffic, world.call(client, world.server) as call:
        node.stop_agent(grace_seconds=0)
        late = world.pod(node, "late", starts=False)
        assert "node agent does not answer" in why_refused(node, late)
        traffic.more()
        assert call.is_answered()
        node.start_agent()
        node.wait_agent()
        world.start(late)
        assert world.say_hello(late, world.server) == (0, "hello")
        traffic.more()
        assert call.is_answered()
    assert traffic.failures == []
    node.wait_proxy_line('direction="outbound"', *identities(late, world.server))
    assert world.bare_connections() == bare


def test_an_agent_that_is_uninstalled_leaves_nothing_if_asked_to(world: World) -> None:
    node, client = world.a, world.pod(world.a, "client")
    node.stop_agent()
    node.settings["ZTUNNEL_CNI_RELEASE_ON_UNINSTALL"] = "true"
    node.start_agent()
    node.wait_agent()
    foreign = ("to", "10.99.0.1", "lookup", "99", "pref", str(TO_POD_PREFERENCE))
    ours = (*foreign, "protocol", str(PROTOCOL))
    try:
        for rule in (ours, foreign):
            node.ip("rule", "add", *rule)
        world.outside.do(lambda api: api.uninstall(is_gone=True))
        node.stop_agent()
        with pytest.raises(OSError, match="No such file"):
            node.ip("rule", "del", *ours)
        node.ip("rule", "del", *foreign)
        assert world.status(client) is None
        assert not is_redirected(client)
        assert node.chain() == node.containerd.primary(*node.subnets)
        assert not [path for path in (node.folder / "bin").iterdir() if not path.is_symlink()]
        assert list(node.run_dir.iterdir()) == [node.run_dir / "istio-cni.log"]
        assert list(node.zds_dir.iterdir()) == []
        tables = [one for one in node.nft("-j", "list", "tables")["nftables"] if "table" in one]
        assert {one["table"]["name"] for one in tables} == {"watch"}
        # Pods start without an agent, and all calls go in the clear.
        node.containerd.wait_for_chain()
        bare, late = world.bare_connections(), world.pod(node, "late")
        for app in (client, late):
            assert world.say_hello(app, world.server) == (0, "hello")
        assert world.bare_connections() >= bare + 4  # each node sees both
    finally:
        world.outside.do(lambda api: api.uninstall(is_gone=False))
        node.settings.clear()
        node.start_agent()
        node.wait_agent()
    wait_until(lambda: {world.status(client), world.status(late)} == {"enabled"}, "capture")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_while_the_proxy_is_replaced_nothing_gets_through(
    world: World, how: signal.Signals
) -> None:
    node, client = world.a, world.pod(world.a, "client")
    bare = world.bare_connections()
    with Traffic(client, world.server) as traffic:
        node.stop_proxy(with_signal=how)
        with pytest.raises(OSError, match="refused"):
            world.call(client, world.server)
        late = world.pod(node, "late", starts=False)
        assert "no node proxy" in why_refused(node, late)
        node.start_proxy()
        node.wait_proxy()
        traffic.more()
        world.start(late)
        assert world.say_hello(late, world.server) == (0, "hello")
    assert set(traffic.failures) != set()
    assert world.bare_connections() == bare


def test_after_a_power_failure_no_pod_starts_before_it_is_captured(world: World) -> None:
    node, client = world.a, world.pod(world.a, "client")
    assert world.say_hello(client, world.server) == (0, "hello")
    old = client.pod
    chain = node.chain()
    node.lose_power([old])
    world.outside.do(lambda api: api.report("client"))
    node.boot()
    world.connect_nodes()
    bare = world.bare_connections()
    assert node.chain() == chain
    # As kubelet does: away with what is left of the old sandbox, and try again until it works.
    node.containerd.remove(old)
    assert "node agent does not answer" in why_refused(node, client)
    node.start_agent()
    node.wait_agent()
    assert "no node proxy" in why_refused(node, client)
    node.start_proxy()
    node.wait_proxy()
    world.start(client)
    assert world.say_hello(client, world.server) == (0, "hello")
    node.wait_proxy_line('direction="outbound"', *identities(client, world.server))
    assert is_redirected(client)
    assert world.bare_connections() == bare
