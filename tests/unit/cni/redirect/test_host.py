from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import pytest

from cni.redirect.errors import RedirectError
from cni.redirect.host import (
    HostPlan,
    apply_host,
    change_members,
    inspect_host,
    read_members,
    remove_host,
)
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
from ztunnel.devmesh.cluster import Cluster, Node, Pod
from ztunnel.model.network import Endpoint, parse_ip

T = TypeVar("T")

V4, V6 = parse_ip("10.1.0.1"), parse_ip("fd00:1::1")


def test_the_rule_is_the_references() -> None:
    shown = str(HostPlan().table)
    assert "type nat hook postrouting priority 100; policy accept;" in shown
    assert (
        "meta l4proto tcp meta skuid 0 ip daddr @istio-inpod-probes-v4"
        " counter snat ip to 169.254.7.127\n"
    ) in shown
    assert "ip6 daddr @istio-inpod-probes-v6 counter snat ip6 to fd16:9254:7127:1337:" in shown
    assert "meta skuid != 4294967295 " in str(HostPlan(owner=None).table)


class Gone:
    """A namespace that cannot be entered."""

    def call(self, action: Callable[[], T]) -> T:
        raise OSError("setns: Invalid argument")


def test_a_host_that_cannot_be_entered_is_reported() -> None:
    with pytest.raises(RedirectError, match="cannot enter the host's namespace"):
        apply_host(Gone(), HostPlan())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def node(cluster: Cluster) -> Node:
    return cluster.add_node("node")


@pytest.mark.netns
@needs_root
class TestOnAHost:
    def test_members_are_put_replaced_and_taken_out(self, node: Node) -> None:
        apply_host(node.netns, HostPlan())
        change_members(node.netns, {V4: "a", V6: "a"}, [])
        assert read_members(node.netns) == {V4: "a", V6: "a"}
        change_members(node.netns, {V4: "b"}, [V6, parse_ip("10.9.9.9")])
        assert read_members(node.netns) == {V4: "b"}
        change_members(node.netns, {}, [])

    def test_writing_the_rule_again_keeps_the_members(self, node: Node) -> None:
        apply_host(node.netns, HostPlan())
        change_members(node.netns, {V4: "a"}, [])
        apply_host(node.netns, HostPlan(owner=None))
        assert read_members(node.netns) == {V4: "a"}
        assert inspect_host(node.netns, HostPlan(owner=None)) == []
        assert inspect_host(node.netns, HostPlan()) != []

    def test_without_sets_there_is_nothing_to_read_or_change(self, node: Node) -> None:
        with pytest.raises(RedirectError, match="cannot read set"):
            read_members(node.netns)
        with pytest.raises(RedirectError, match=r"add 10\.1\.0\.1 in set"):
            change_members(node.netns, {V4: "a"}, [])

    @needs_nft
    def test_removal_leaves_nothing(self, node: Node) -> None:
        apply_host(node.netns, HostPlan())
        change_members(node.netns, {V4: "a"}, [])
        remove_host(node.netns)
        remove_host(node.netns)
        assert ruleset(node) == []

    @needs_nft
    def test_the_kernel_holds_what_the_plan_prints(self, cluster: Cluster, node: Node) -> None:
        other = cluster.add_node("other")
        for plan in (HostPlan(), HostPlan(owner=None), HostPlan(sources=(parse_ip("1.2.3.4"),))):
            apply_host(node.netns, plan)
            remove_host(other.netns)
            sets = "".join(
                f"add set inet istio-ambient-nat istio-inpod-probes-{name} {{ type {kind}; }}\n"
                for name, kind in (("v4", "ipv4_addr"), ("v6", "ipv6_addr"))
            )
            table = "add table inet istio-ambient-nat\n"
            output_of(other, "nft", "-f", "-", stdin=f"{table}{sets}{plan.table}")
            assert ruleset(node) == ruleset(other)

    @pytest.mark.parametrize("ip", [V4, V6], ids=["ipv4", "ipv6"])
    def test_what_the_host_sends_to_a_member_comes_from_the_probe_address(
        self, cluster: Cluster, node: Node, ip: object
    ) -> None:
        pod: Pod = cluster.add_pod(node, "pod", str(V4), str(V6))
        other = cluster.add_pod(node, "other", "10.1.0.2", "fd00:1::2")
        apply_host(node.netns, HostPlan())
        change_members(node.netns, {V4: "a", V6: "a"}, [])
        with ExitStack() as stack:
            app = stack.enter_context(listen(pod.netns, 8080))
            for caller, wanted in (
                (node, {"169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"}),
                (other, {"10.1.0.2", "fd00:1::2"}),
            ):
                client = stack.enter_context(connect(caller.netns, str(ip), 8080))
                served = stack.enter_context(accept(app))
                assert str(Endpoint.of(served.getpeername()).ip) in wanted
                assert echoed(client, served)
