from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from cni.redirect.branch_eni import Detour, Detours, HostRoute, InputRule, plan_detour
from cni.redirect.errors import RedirectError
from tests.support.namespaces import needs_root, open_descriptors, output_of
from ztunnel.devmesh.cluster import Cluster, Node, Pod

POD, OTHER = ip_address("10.1.0.1"), ip_address("10.1.0.2")
VETH_ROUTE = HostRoute(POD, 101, "vlan1")
VETH_RULE = InputRule("vlan1", 101, 10)


def test_an_address_with_a_table_of_its_own_needs_a_rule_each_way() -> None:
    assert plan_detour(POD, [VETH_ROUTE], [VETH_RULE]) == Detour(POD, 101, "vlan1", 9)


@pytest.mark.parametrize(
    ("route", "rule"),
    [
        pytest.param(HostRoute(OTHER, 101, "vlan1"), VETH_RULE, id="another pod's route"),
        pytest.param(HostRoute(POD, 254, "vlan1"), InputRule("vlan1", 254, 10), id="main table"),
        pytest.param(HostRoute(POD, 255, "vlan1"), InputRule("vlan1", 255, 10), id="local table"),
        pytest.param(VETH_ROUTE, InputRule("vlan2", 101, 10), id="another interface's rule"),
        pytest.param(VETH_ROUTE, InputRule("vlan1", 102, 10), id="another table's rule"),
        pytest.param(VETH_ROUTE, InputRule("vlan1", 101, 0), id="no room before the rule"),
    ],
)
def test_any_other_needs_none(route: HostRoute, rule: InputRule) -> None:
    assert plan_detour(POD, [route], [rule]) is None


@pytest.mark.netns
@needs_root
@pytest.mark.requires_program("ip")
class TestOnAHost:
    @pytest.fixture
    def cluster(self) -> Iterator[Cluster]:
        with Cluster() as cluster:
            yield cluster

    @pytest.fixture
    def node(self, cluster: Cluster) -> Node:
        """A host as the CNI of AWS leaves it for a pod with an interface of its own."""
        node = cluster.add_node("node")
        pod: Pod = cluster.add_pod(node, "pod", str(POD))
        link = f"pod{pod.port}"
        output_of(node, "ip", "route", "add", f"{POD}/32", "dev", link, "table", "101")
        output_of(node, "ip", "rule", "add", "iif", link, "lookup", "101", "pref", "10")
        demux(node, "0")
        return node

    def test_rules_come_and_go_with_the_address(self, node: Node) -> None:
        before, fds = rules(node), open_descriptors()
        detours = Detours(node.netns)
        for _ in range(2):  # the second time they are there
            detours.put([POD, OTHER, ip_address("fd00::1")])
        added = [line for line in rules(node) if line not in before]
        assert len(added) == 2
        assert added[0].startswith("9:\tfrom all iif pod")
        assert added[0].endswith("lookup local")
        assert added[1] == f"512:\tfrom all to {POD} lookup 101"
        detours.drop([POD, OTHER])
        assert rules(node) == before
        detours.drop([POD])
        detours.settle([POD])
        assert len(rules(node)) == len(before) + 2
        detours.settle([OTHER])
        assert rules(node) == before
        detours.put([POD])
        detours.clear()
        assert rules(node) == before
        assert open_descriptors() == fds

    def test_what_another_agent_left_is_taken_over(self, node: Node) -> None:
        before = rules(node)
        Detours(node.netns).put([POD])
        successor = Detours(node.netns)
        successor.put([POD])
        successor.drop([POD])
        assert rules(node) == before

    def test_with_early_demultiplexing_the_host_is_left_alone(self, node: Node) -> None:
        demux(node, "1")
        before = rules(node)
        Detours(node.netns).put([POD])
        assert rules(node) == before

    def test_if_the_second_rule_is_refused_the_first_one_goes(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = rules(node)
        # The kernel knows no interface with a name as long as this.
        monkeypatch.setattr(Detours, "_name", lambda self, index: "x" * 20)
        monkeypatch.setattr(
            "cni.redirect.branch_eni._rules", lambda sock: iter([InputRule("x" * 20, 101, 10)])
        )
        detours = Detours(node.netns)
        with pytest.raises(RedirectError, match="cannot change the host's rules"):
            detours.put([POD])
        assert rules(node) == before
        detours.clear()


def rules(node: Node) -> list[str]:
    return output_of(node, "ip", "rule").splitlines()


def demux(node: Node, value: str) -> None:
    node.netns.call(lambda: Path("/proc/sys/net/ipv4/tcp_early_demux").write_text(value))
