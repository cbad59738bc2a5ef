from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cni.redirect.apply import apply_redirect, remove_redirect
from cni.redirect.errors import RedirectError
from cni.redirect.plan import NAT, RedirectPlan
from cni.redirect.rules import Chain, Jump, Rule, Table
from tests.support.namespaces import (
    accept,
    connect,
    echoed,
    listen,
    needs_nft,
    needs_root,
    output_of,
    ruleset,
)
from ztunnel.devmesh.cluster import Cluster, Member, Pod
from ztunnel.linux import sockopt
from ztunnel.model.network import Endpoint

pytestmark = [pytest.mark.netns, needs_root]

MARK = 0x539
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
PLANS = [
    pytest.param(RedirectPlan(), id="default"),
    pytest.param(RedirectPlan(ipv6=False), id="ipv4 only"),
    pytest.param(RedirectPlan(dns=True), id="dns"),
    pytest.param(RedirectPlan(dns=True, ipv6=False), id="dns, ipv4 only"),
    pytest.param(RedirectPlan(ingress_mode=True), id="ingress mode"),
    pytest.param(RedirectPlan(virtual_interfaces=("tap0", "vm-1")), id="virtual interfaces"),
    pytest.param(RedirectPlan(syn_only=True), id="first segments only"),
]


@dataclass
class Scene:
    cluster: Cluster
    pod: Pod  # the one that is redirected
    other: Pod  # on another node, not in the mesh

    def ip(self, pod: Member, family: int) -> str:
        return str(pod.addresses[family])


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Cluster() as cluster:
        here, there = cluster.add_node("here"), cluster.add_node("there")
        pod = cluster.add_pod(here, "pod", "10.1.0.1", "fd00:1::1")
        other = cluster.add_pod(there, "other", "10.2.0.1", "fd00:2::1")
        yield Scene(cluster, pod, other)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@FAMILIES
def test_what_goes_out_reaches_the_proxy_with_its_destination(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    proxy = stack.enter_context(listen(scene.pod.netns, 15001, mark=MARK))
    target = scene.ip(scene.other, family)
    client = stack.enter_context(connect(scene.pod.netns, target, 80))
    caught = stack.enter_context(accept(proxy))
    assert sockopt.original_destination(caught) == Endpoint.of((target, 80))
    assert echoed(client, caught)


@FAMILIES
def test_what_comes_in_reaches_the_proxy_with_its_destination(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    proxy = stack.enter_context(listen(scene.pod.netns, 15006, mark=MARK))
    target = scene.ip(scene.pod, family)
    client = stack.enter_context(connect(scene.other.netns, target, 8080))
    caught = stack.enter_context(accept(proxy))
    assert sockopt.original_destination(caught) == Endpoint.of((target, 8080))
    assert Endpoint.of(caught.getpeername()).ip == scene.other.addresses[family]
    assert echoed(client, caught)


@FAMILIES
def test_a_neighbour_that_sends_the_pod_what_is_for_others_does_not_reach_the_proxy(
    scene: Scene, family: int
) -> None:
    elsewhere, flag = (("192.0.2.9", "-4"), ("2001:db8::9", "-6"))[family]
    neighbour = scene.pod.node
    output_of(neighbour, "ip", flag, "route", "add", elsewhere, "via", scene.ip(scene.pod, family))
    # What goes on to the pod's routes finds an end there, at once.
    output_of(scene.pod, "ip", flag, "route", "add", "unreachable", elsewhere)
    switch = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")[family]
    scene.pod.netns.call(lambda: Path("/proc/sys", switch).write_text("1"))
    apply_redirect(scene.pod.netns, RedirectPlan())
    with (
        listen(scene.pod.netns, 15006, mark=MARK),
        pytest.raises(OSError, match=r"No route to host|Network is unreachable"),
    ):
        connect(neighbour.netns, elsewhere, 80).close()


def test_the_pods_link_local_address_is_its_own(scene: Scene, stack: contextlib.ExitStack) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    proxy = stack.enter_context(listen(scene.pod.netns, 15006, mark=MARK))
    output_of(scene.pod, "ip", "address", "add", "fe80::5/64", "dev", "eth0", "nodad")
    neighbours = output_of(scene.pod.node, "ip", "-6", "route", "show", "fd00:1::1")
    host_end = neighbours.split()[neighbours.split().index("dev") + 1]
    target = f"fe80::5%{host_end}", 80
    stack.enter_context(scene.pod.node.netns.call(lambda: socket.create_connection(target, 5)))
    caught = stack.enter_context(accept(proxy))
    assert str(sockopt.original_destination(caught).ip) == "fe80::5"


@FAMILIES
def test_the_tunnel_port_is_not_redirected(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    tunnel = stack.enter_context(listen(scene.pod.netns, 15008, mark=MARK))
    target = scene.ip(scene.pod, family)
    client = stack.enter_context(connect(scene.other.netns, target, 15008))
    caught = stack.enter_context(accept(tunnel))
    assert sockopt.original_destination(caught) == Endpoint.of((target, 15008))
    assert echoed(client, caught)


@FAMILIES
def test_what_the_proxy_sends_goes_straight_out(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    server = stack.enter_context(listen(scene.other.netns, 80))
    target = scene.ip(scene.other, family)
    client = stack.enter_context(connect(scene.pod.netns, target, 80, mark=MARK))
    reached = stack.enter_context(accept(server))
    assert Endpoint.of(reached.getpeername()).ip == scene.pod.addresses[family]
    assert echoed(client, reached)


@FAMILIES
def test_the_application_sees_the_clients_address_and_can_answer(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    spoofed = scene.ip(scene.other, family)
    target = scene.ip(scene.pod, family)
    proxy = stack.enter_context(connect(scene.pod.netns, target, 8080, mark=MARK, source=spoofed))
    served = stack.enter_context(accept(app))
    assert Endpoint.of(served.getpeername()).ip == scene.other.addresses[family]
    assert echoed(proxy, served)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback_is_left_alone(scene: Scene, stack: contextlib.ExitStack, host: str) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    client = stack.enter_context(connect(scene.pod.netns, host, 8080))
    assert echoed(client, stack.enter_context(accept(app)))


@FAMILIES
def test_an_application_that_calls_its_own_pod_is_left_alone(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    client = stack.enter_context(connect(scene.pod.netns, scene.ip(scene.pod, family), 8080))
    assert echoed(client, stack.enter_context(accept(app)))


@FAMILIES
def test_without_a_proxy_connections_are_refused(scene: Scene, family: int) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    with listen(scene.pod.netns, 8080), listen(scene.other.netns, 80):
        with pytest.raises(ConnectionRefusedError):
            connect(scene.pod.netns, scene.ip(scene.other, family), 80)
        with pytest.raises(ConnectionRefusedError):
            connect(scene.other.netns, scene.ip(scene.pod, family), 8080)


@FAMILIES
def test_probes_reach_the_application(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    host = scene.cluster.add_outside(
        "kubelet", "169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
    )
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    probe = stack.enter_context(connect(host.netns, scene.ip(scene.pod, family), 8080))
    assert echoed(probe, stack.enter_context(accept(app)))


def test_in_ingress_mode_plaintext_comes_in_directly(
    scene: Scene, stack: contextlib.ExitStack
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(ingress_mode=True))
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    client = stack.enter_context(connect(scene.other.netns, scene.ip(scene.pod, 0), 8080))
    assert echoed(client, stack.enter_context(accept(app)))


def test_what_comes_in_by_a_virtual_interface_is_treated_as_going_out(
    scene: Scene, stack: contextlib.ExitStack
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(virtual_interfaces=("eth0",)))
    proxy = stack.enter_context(listen(scene.pod.netns, 15001, mark=MARK))
    stack.enter_context(connect(scene.other.netns, scene.ip(scene.pod, 0), 8080))
    caught = stack.enter_context(accept(proxy))
    assert sockopt.original_destination(caught) == Endpoint.of((scene.ip(scene.pod, 0), 8080))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
@FAMILIES
def test_dns_queries_reach_the_proxy_and_answers_seem_to_come_from_the_server(
    scene: Scene, stack: contextlib.ExitStack, kind: socket.SocketKind, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(dns=True))
    number, loopback = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")][family]
    proxy = stack.enter_context(scene.pod.netns.call(lambda: socket.socket(number, kind)))
    client = stack.enter_context(scene.pod.netns.call(lambda: socket.socket(number, kind)))
    proxy.settimeout(5)
    client.settimeout(5)
    sockopt.set_mark(proxy, MARK)
    proxy.bind((loopback, 15053))
    if kind is socket.SOCK_STREAM:
        proxy.listen()
    client.connect((scene.ip(scene.other, family), 53))
    if kind is socket.SOCK_STREAM:
        assert echoed(client, stack.enter_context(accept(proxy)))
        return
    client.send(b"query")
    query, sender = proxy.recvfrom(64)
    proxy.sendto(b"answer to " + query, sender)
    assert client.recv(64) == b"answer to query"


def test_without_dns_capture_queries_go_out(scene: Scene, stack: contextlib.ExitStack) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    server = stack.enter_context(
        scene.other.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    )
    client = stack.enter_context(
        scene.pod.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    )
    server.settimeout(5)
    server.bind(("0.0.0.0", 53))
    client.sendto(b"query", (scene.ip(scene.other, 0), 53))
    assert server.recv(64) == b"query"


@pytest.mark.parametrize("plan", [RedirectPlan(), RedirectPlan(syn_only=True)], ids=["no", "yes"])
def test_connections_from_before_live_on_only_if_asked_to(
    scene: Scene, stack: contextlib.ExitStack, plan: RedirectPlan
) -> None:
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    client = stack.enter_context(connect(scene.other.netns, scene.ip(scene.pod, 0), 8080))
    served = stack.enter_context(accept(app))
    assert echoed(client, served)
    apply_redirect(scene.pod.netns, plan)
    if plan.syn_only:
        assert echoed(client, served)
    else:
        client.sendall(b"ping")
        with pytest.raises(ConnectionResetError):
            client.recv(16)
    proxy = stack.enter_context(listen(scene.pod.netns, 15006, mark=MARK))
    stack.enter_context(connect(scene.other.netns, scene.ip(scene.pod, 0), 8080))
    stack.enter_context(accept(proxy))


@FAMILIES
def test_removal_restores_direct_traffic(
    scene: Scene, stack: contextlib.ExitStack, family: int
) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(dns=True))
    remove_redirect(scene.pod.netns)
    app = stack.enter_context(listen(scene.pod.netns, 8080))
    client = stack.enter_context(connect(scene.other.netns, scene.ip(scene.pod, family), 8080))
    assert echoed(client, stack.enter_context(accept(app)))
    server = stack.enter_context(listen(scene.other.netns, 80))
    client = stack.enter_context(connect(scene.pod.netns, scene.ip(scene.other, family), 80))
    assert echoed(client, stack.enter_context(accept(server)))


@needs_nft
@pytest.mark.parametrize("plan", PLANS)
def test_the_kernel_holds_what_the_plan_prints(scene: Scene, plan: RedirectPlan) -> None:
    apply_redirect(scene.pod.netns, plan)
    output_of(scene.other, "nft", "-f", "-", stdin=str(plan))
    assert ruleset(scene.pod) == ruleset(scene.other)
    assert ruleset(scene.pod)


@needs_nft
@pytest.mark.parametrize("plan", PLANS)
def test_applying_twice_is_as_applying_once(scene: Scene, plan: RedirectPlan) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(dns=True, virtual_interfaces=("old0",)))
    apply_redirect(scene.pod.netns, plan)
    apply_redirect(scene.pod.netns, plan)
    apply_redirect(scene.other.netns, plan)
    assert ruleset(scene.pod) == ruleset(scene.other)


@needs_nft
def test_removal_leaves_nothing_and_may_be_repeated(scene: Scene) -> None:
    before = [ruleset(scene.pod), policy_routes(scene.pod)]
    apply_redirect(scene.pod.netns, RedirectPlan(dns=True))
    assert [ruleset(scene.pod), policy_routes(scene.pod)] != before
    remove_redirect(scene.pod.netns)
    remove_redirect(scene.pod.netns)
    assert [ruleset(scene.pod), policy_routes(scene.pod)] == before


class Broken(RedirectPlan):
    """Fine but for its last rule."""

    @property
    def tables(self) -> tuple[Table, ...]:
        wrong = Table(NAT, (Chain("istio-output", (Rule((), Jump("nowhere")),)),))
        return (*super().tables, wrong)


@needs_nft
def test_a_refused_rule_is_named_and_the_old_rules_stand(scene: Scene) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(ipv6=False))
    before = ruleset(scene.pod)
    with pytest.raises(RedirectError, match=r"add rule .* jump nowhere: No such file"):
        apply_redirect(scene.pod.netns, Broken())
    assert ruleset(scene.pod) == before


def policy_routes(member: Member) -> list[str]:
    commands = [
        ["ip", flag, *words]
        for flag in ("-4", "-6")
        for words in (["rule"], ["route", "show", "table", "all", "type", "local"])
    ]
    lines = [line for words in commands for line in output_of(member, *words).splitlines()]
    return [line.strip() for line in lines]


def test_marked_packets_are_routed_to_the_proxy(scene: Scene) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan(ipv6=False))
    apply_redirect(scene.pod.netns, RedirectPlan())
    apply_redirect(scene.pod.netns, RedirectPlan())
    lines = policy_routes(scene.pod)
    assert lines.count("32764:	from all fwmark 0x111/0xfff lookup 100") == 2
    assert lines.count("local default dev lo table 100 scope host") == 1
    assert len([line for line in lines if line.startswith("local default dev lo table 100")]) == 2


def test_ipv6_routes_are_left_out_where_loopback_has_no_ipv6(scene: Scene) -> None:
    output_of(scene.pod, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6")
    apply_redirect(scene.pod.netns, RedirectPlan())
    local = [line for line in policy_routes(scene.pod) if "table 100" in line]
    assert local == ["local default dev lo table 100 scope host"]


def test_waiting_connections_may_move_to_a_new_proxy(scene: Scene) -> None:
    apply_redirect(scene.pod.netns, RedirectPlan())
    assert output_of(scene.pod, "cat", "/proc/sys/net/ipv4/tcp_migrate_req") == "1\n"
    assert output_of(scene.other, "cat", "/proc/sys/net/ipv4/tcp_migrate_req") == "0\n"
