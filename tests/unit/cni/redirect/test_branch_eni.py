from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from cni.redirect.branch_eni import Detour, Detours, HostRoute, InputRule, plan_detour
from cni.redirect.errors import RedirectError
from tests.support.namespaces import needs_root, open_descriptors, output_of
from ztunnel.devmesh.cluster import Cluster, Pod
from ztunnel.model.network import IpAddress, parse_ip

POD, OTHER = parse_ip("10.1.0.1"), parse_ip("10.1.0.2")
POD_RULE = re.compile(r"^(9:\t.* iif pod\d+ lookup local|512:\t.* to \S+ lookup \d+) proto 133$")
IPV4 = (POD, OTHER, parse_ip("10.1.0.99"))
IPV6 = (parse_ip("fd00::1"), parse_ip("fd00::2"), parse_ip("fd00::99"))
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


class Site:
    """A host as the CNI of AWS leaves it, with a pod that has an interface of its own."""

    def __init__(self, cluster: Cluster, ips: tuple[IpAddress, IpAddress, IpAddress]) -> None:
        self.pod, self.other, self.usual = ips  # the last one has no table
        self.cluster = cluster
        self.pods: dict[str, Pod] = {}
        self.node = cluster.add_node("node")
        self.add_pod(self.pod, table=101)
        self.set_demux("0")

    def detours(self, *, makes: bool = True) -> Detours:
        return Detours(self.node.netns, makes=makes)

    def add_pod(self, ip: IpAddress, *, table: int) -> str:
        """Add a pod whose traffic has a table of its own; return its link's name."""
        name, v4 = f"pod-{table}", f"10.9.0.{table}"
        added: Pod = (
            self.cluster.add_pod(self.node, name, str(ip))
            if ip.version == 4
            else self.cluster.add_pod(self.node, name, v4, str(ip))
        )
        link = f"pod{added.port}"
        self.ip(f"route add {ip}/{ip.max_prefixlen} dev {link} table {table}")
        self.ip(f"rule add iif {link} lookup {table} pref 10")
        self.pods[link] = added
        return link

    def remove_pod(self, link: str, *, table: int) -> None:
        """Do as container runtime and CNI do when a pod ends."""
        self.cluster.remove_pod(self.pods.pop(link))
        self.ip(f"rule del iif {link} lookup {table}")

    def ip(self, words: str) -> str:
        return output_of(self.node, "ip", f"-{self.pod.version}", *words.split())

    def rules(self) -> list[str]:
        # Whether the interface is there at the moment does not matter here.
        return self.ip("rule").replace(" [detached]", "").splitlines()

    def ours(self) -> list[str]:
        return list(filter(POD_RULE.search, self.rules()))

    def set_demux(self, value: str) -> None:
        self.node.netns.call(
            lambda: Path("/proc/sys/net/ipv4/tcp_early_demux").write_text(value, encoding="ascii")
        )


@pytest.fixture(params=[IPV4, IPV6], ids=["IPv4", "IPv6"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Cluster() as cluster:
        yield Site(cluster, request.param)


@pytest.mark.netns
@needs_root
@pytest.mark.requires_program("ip")
class TestOnAHost:
    def test_rules_come_and_go_with_the_address(self, site: Site) -> None:
        before, fds = site.rules(), open_descriptors()
        detours = site.detours()
        for _ in range(2):  # the second time they are there
            detours.put([site.pod, site.other, site.usual])
        added = [line for line in site.rules() if line not in before]
        assert added == [
            "9:\tfrom all iif pod10 lookup local proto 133",
            f"512:\tfrom all to {site.pod} lookup 101 proto 133",
        ]
        detours.drop([site.pod, site.other])
        assert site.rules() == before
        detours.drop([site.pod])
        detours.settle([site.pod])
        assert len(site.rules()) == len(before) + 2
        detours.settle([site.other])
        assert site.rules() == before
        detours.put([site.pod])
        detours.clear()
        assert site.rules() == before
        assert open_descriptors() == fds

    def test_what_another_agent_left_is_taken_over(self, site: Site) -> None:
        before = site.rules()
        site.detours().put([site.pod])
        successor = site.detours()
        successor.put([site.pod])
        successor.drop([site.pod])
        assert site.rules() == before

    def test_what_was_left_of_a_pod_that_went_while_no_agent_ran_goes(self, site: Site) -> None:
        link = site.add_pod(site.other, table=102)
        add_foreign_rules(site)
        before = site.rules()
        site.detours().put([site.pod])
        lives = site.rules()
        site.detours().put([site.other])
        assert len(site.rules()) == len(lives) + 2
        site.remove_pod(link, table=102)
        for noted in (before, lives):
            noted.remove(f"10:\tfrom all iif {link} lookup 102")
        successor = site.detours()
        version = f"IPv{site.pod.version}"
        assert successor.settle([site.pod]) == [
            f"{version} iif {link} lookup 255 pref 9",
            f"{version} to {site.other} lookup 102 pref 512",
        ]
        assert site.rules() == lives
        assert successor.settle([site.pod]) == []
        successor.clear()
        assert site.rules() == before

    def test_an_agent_that_goes_for_good_or_may_make_none_removes_what_others_left(
        self, site: Site
    ) -> None:
        before = site.rules()
        for leave in (
            lambda: site.detours().clear(),
            lambda: site.detours(makes=False).settle([site.pod]),
        ):
            site.detours().put([site.pod])
            assert site.rules() != before
            leave()
            assert site.rules() == before
        site.detours(makes=False).put([site.pod])
        assert site.rules() == before

    def test_a_rule_that_somebody_removed_comes_back(self, site: Site) -> None:
        detours = site.detours()
        detours.settle([site.pod])
        made = site.rules()
        assert len(site.ours()) == 2
        for line in site.ours():
            preference, _, rest = line.partition(":\tfrom all ")
            site.ip(f"rule del {rest} pref {preference}")
            assert site.rules() != made
            detours.settle([site.pod])
            assert site.rules() == made

    def test_an_address_that_has_gone_to_another_pod_takes_that_ones_table(
        self, site: Site
    ) -> None:
        detours = site.detours()
        detours.put([site.pod])
        site.ip("route flush table 101")
        link = site.add_pod(site.other, table=102)
        site.ip(f"route add {site.pod}/{site.pod.max_prefixlen} dev {link} table 102")
        detours.put([site.pod])
        assert site.ours() == [
            f"9:\tfrom all iif {link} lookup local proto 133",
            f"512:\tfrom all to {site.pod} lookup 102 proto 133",
        ]

    def test_rules_of_pods_that_live_stay_also_if_demultiplexing_is_switched_on(
        self, site: Site
    ) -> None:
        site.detours().put([site.pod])
        lives = site.rules()
        site.ip(f"rule add to {site.other} lookup 101 protocol 133 pref 512")
        site.set_demux("1")
        successor = site.detours()
        successor.settle([site.pod])
        assert site.rules() == lives
        successor.drop([site.pod])
        assert site.ours() == []

    def test_with_early_demultiplexing_the_host_is_left_alone(self, site: Site) -> None:
        site.set_demux("1")
        before = site.rules()
        detours = site.detours()
        detours.put([site.pod])
        detours.settle([site.pod])
        assert site.rules() == before

    def test_if_the_second_rule_is_refused_the_first_one_goes(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = site.rules()
        # The kernel knows no interface with a name as long as this.
        monkeypatch.setattr(Detours, "_name", lambda self, index: "x" * 20)
        monkeypatch.setattr(
            "cni.redirect.branch_eni._rules", lambda sock, _: iter([InputRule("x" * 20, 101, 10)])
        )
        detours = site.detours()
        with pytest.raises(RedirectError, match="cannot change the host's rules"):
            detours.put([site.pod])
        assert site.rules() == before
        detours.clear()


def add_foreign_rules(site: Site) -> None:
    """Add rules of others that look like ours, in all but one thing."""
    before, ip = site.rules(), site.other
    network = ip_network((ip, ip.max_prefixlen - 8), strict=False)
    for words in (
        f"to {ip} lookup 102 pref 512",  # as the reference's agent makes them
        "iif pod11 lookup local pref 9",
        f"to {ip} lookup 102 pref 512 protocol 134",
        f"to {ip} lookup 102 pref 511 protocol 133",
        f"to {ip} iif pod11 lookup 104 pref 512 protocol 133",
        f"to {ip} fwmark 1 lookup 104 pref 512 protocol 133",
        f"from {ip} lookup 102 pref 512 protocol 133",
        "iif pod11 lookup 103 pref 9 protocol 133",
        f"to {network} lookup 102 pref 512 protocol 133",
        f"to {ip} unreachable pref 512 protocol 133",
    ):
        site.ip(f"rule add {words}")
    assert len(site.rules()) == len(before) + 10


@pytest.mark.netns
@needs_root
@pytest.mark.requires_program("ip")
def test_a_pod_with_both_families_has_rules_in_each() -> None:
    with Cluster() as cluster:
        site = Site(cluster, IPV6)
        v4, v6 = next(iter(site.pods.values())).addresses
        for words in (f"route add {v4}/32 dev pod10 table 101", "rule add iif pod10 lookup 101"):
            output_of(site.node, "ip", "-4", *words.split())
        site.detours().put([v4, v6])
        both = [output_of(site.node, "ip", flag, "rule") for flag in ("-4", "-6")]
        assert [text.count("proto 133") for text in both] == [2, 2]
        assert len(site.detours().settle([v6])) == 2
        assert len(site.ours()) == 2
        assert "proto 133" not in output_of(site.node, "ip", "-4", "rule")
