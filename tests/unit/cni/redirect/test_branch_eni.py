from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from cni.redirect.branch_eni import Detour, Detours, HostRoute, InputRule, plan_detour
from cni.redirect.errors import RedirectError
from tests.support.namespaces import needs_root, open_descriptors, output_of
from ztunnel.devmesh.cluster import Cluster, Node, Pod
from ztunnel.model.network import IpAddress

POD, OTHER = ip_address("10.1.0.1"), ip_address("10.1.0.2")
OURS = ("protocol", "133", "pref")
POD_RULE = re.compile(r"^(9:\t.* iif pod\d+ lookup local|512:\t.* to \S+ lookup \d+) proto 133$")
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
        branch_pod(cluster, node, POD, table=101)
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
        assert added[0].endswith("lookup local proto 133")
        assert added[1] == f"512:\tfrom all to {POD} lookup 101 proto 133"
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

    def test_what_was_left_of_a_pod_that_went_while_no_agent_ran_goes(
        self, cluster: Cluster, node: Node
    ) -> None:
        gone = branch_pod(cluster, node, OTHER, table=102)
        add_foreign_rules(node)
        before = rules(node)
        Detours(node.netns).put([POD])
        lives = rules(node)
        Detours(node.netns).put([OTHER])
        assert len(rules(node)) == len(lives) + 2
        cluster.remove_pod(gone)
        output_of(node, "ip", "rule", "del", "iif", f"pod{gone.port}", "lookup", "102")
        for noted in (before, lives):
            noted.remove(f"10:\tfrom all iif pod{gone.port} lookup 102")
        successor = Detours(node.netns)
        assert successor.settle([POD]) == [
            f"iif pod{gone.port} lookup 255 pref 9",
            f"to {OTHER} lookup 102 pref 512",
        ]
        assert rules(node) == lives
        assert successor.settle([POD]) == []
        successor.clear()
        assert rules(node) == before

    def test_an_agent_that_goes_for_good_or_may_make_none_removes_what_others_left(
        self, node: Node
    ) -> None:
        before = rules(node)
        for leave in (
            lambda: Detours(node.netns).clear(),
            lambda: Detours(node.netns, makes=False).settle([POD]),
        ):
            Detours(node.netns).put([POD])
            assert rules(node) != before
            leave()
            assert rules(node) == before
        Detours(node.netns, makes=False).put([POD])
        assert rules(node) == before

    def test_a_rule_that_somebody_removed_comes_back(self, node: Node) -> None:
        detours = Detours(node.netns)
        detours.settle([POD])
        made = rules(node)
        for line in filter(POD_RULE.search, made):
            preference, _, rest = line.partition(":\tfrom all ")
            output_of(node, "ip", "rule", "del", *rest.split(), "pref", preference)
            assert rules(node) != made
            detours.settle([POD])
            assert rules(node) == made

    def test_an_address_that_has_gone_to_another_pod_takes_that_ones_table(
        self, cluster: Cluster, node: Node
    ) -> None:
        detours = Detours(node.netns)
        detours.put([POD])
        output_of(node, "ip", "route", "flush", "table", "101")
        new = branch_pod(cluster, node, OTHER, table=102)
        link = f"pod{new.port}"
        output_of(node, "ip", "route", "add", f"{POD}/32", "dev", link, "table", "102")
        detours.put([POD])
        made = [line for line in rules(node) if POD_RULE.search(line)]
        assert made == [
            f"9:\tfrom all iif {link} lookup local proto 133",
            f"512:\tfrom all to {POD} lookup 102 proto 133",
        ]

    def test_rules_of_pods_that_live_stay_also_if_demultiplexing_is_switched_on(
        self, node: Node
    ) -> None:
        Detours(node.netns).put([POD])
        lives = rules(node)
        output_of(node, "ip", "rule", "add", "to", str(OTHER), "lookup", "101", *OURS, "512")
        demux(node, "1")
        successor = Detours(node.netns)
        successor.settle([POD])
        assert rules(node) == lives
        successor.drop([POD])
        assert not any(map(POD_RULE.search, rules(node)))

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


def branch_pod(cluster: Cluster, node: Node, ip: IpAddress, *, table: int) -> Pod:
    """Add a pod whose traffic has a table of its own."""
    pod = cluster.add_pod(node, f"pod-{table}", str(ip))
    link, number = f"pod{pod.port}", str(table)
    output_of(node, "ip", "route", "add", f"{ip}/32", "dev", link, "table", number)
    output_of(node, "ip", "rule", "add", "iif", link, "lookup", number, "pref", "10")
    return pod


def add_foreign_rules(node: Node) -> None:
    """Add rules of others that look like ours, in all but one thing."""
    before = rules(node)
    for words in (
        f"to {OTHER} lookup 102 pref 512",  # as the reference's agent makes them
        "iif pod11 lookup local pref 9",
        f"to {OTHER} lookup 102 pref 512 protocol 134",
        f"to {OTHER} lookup 102 pref 511 protocol 133",
        f"to {OTHER} iif pod11 lookup 104 pref 512 protocol 133",
        f"to {OTHER} fwmark 1 lookup 104 pref 512 protocol 133",
        f"from {OTHER} lookup 102 pref 512 protocol 133",
        "iif pod11 lookup 103 pref 9 protocol 133",
        "to 10.1.0.0/24 lookup 102 pref 512 protocol 133",
        f"to {OTHER} unreachable pref 512 protocol 133",
    ):
        output_of(node, "ip", "rule", "add", *words.split())
    assert len(rules(node)) == len(before) + 10


def rules(node: Node) -> list[str]:
    # Whether the interface is there at the moment does not matter here.
    return output_of(node, "ip", "rule").replace(" [detached]", "").splitlines()


def demux(node: Node, value: str) -> None:
    node.netns.call(lambda: Path("/proc/sys/net/ipv4/tcp_early_demux").write_text(value))
