from __future__ import annotations

from collections.abc import Iterator

import pytest

from cni.redirect import nft
from cni.redirect.dump import differences, read_ruleset, ruleset_of
from cni.redirect.errors import RedirectError
from cni.redirect.plan import NAT, RAW, TABLE_NAMES, Exclusion, RedirectPlan
from tests.support.namespaces import needs_nft, needs_root, output_of
from ztunnel.devmesh.cluster import Cluster, Member
from ztunnel.linux.netlink import NetlinkSocket

PLANS = [
    RedirectPlan(),
    RedirectPlan(ipv6=False, ingress_mode=True),
    RedirectPlan(dns=True, syn_only=True, virtual_interfaces=("tap0",)),
    RedirectPlan(inbound_exclusion=Exclusion(ports=(22,)), probe_sources=()),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_transaction_is_read_as_what_it_leaves(plan: RedirectPlan) -> None:
    wanted = ruleset_of(nft.replacement(plan))
    assert set(wanted.tables) == {table.name for table in plan.tables}
    assert {(table.name, chain.name): len(chain.rules) for table in plan.tables
            for chain in table.chains if chain.rules} == {
        key: len(rules) for key, rules in wanted.rules.items()
    }  # fmt: skip
    assert differences(wanted, wanted, TABLE_NAMES) == []


def test_different_plans_differ() -> None:
    for one in PLANS:
        for other in PLANS:
            found = differences(
                ruleset_of(nft.replacement(one)), ruleset_of(nft.replacement(other)), TABLE_NAMES
            )
            assert bool(found) == (one is not other)


def test_a_table_too_many_is_named_and_others_tables_are_not() -> None:
    plain = ruleset_of(nft.replacement(RedirectPlan()))
    with_dns = ruleset_of(nft.replacement(RedirectPlan(dns=True)))
    assert differences(plain, with_dns, TABLE_NAMES)[0] == f"table {RAW} is left over"
    plain.tables["theirs"] = ""
    plain.chains["theirs", "input"] = None
    assert differences(ruleset_of(nft.replacement(RedirectPlan())), plain, TABLE_NAMES) == []


def test_a_stamp_is_part_of_the_same_transaction() -> None:
    stamped = ruleset_of(nft.stamped(RedirectPlan(), "pod x"))
    assert stamped.tables[NAT] == "pod x"
    assert differences(ruleset_of(nft.replacement(RedirectPlan())), stamped, TABLE_NAMES) == []


class Refusing(NetlinkSocket):
    """A kernel that tells nothing."""

    def __init__(self) -> None:
        pass

    def dump(self, data: bytes) -> list[bytes]:
        raise PermissionError(1, "no")


def test_a_kernel_that_tells_nothing_is_an_error() -> None:
    with pytest.raises(RedirectError, match="cannot read redirection rules"):
        read_ruleset(Refusing())


@pytest.fixture
def member() -> Iterator[Member]:
    with Cluster() as cluster:
        yield cluster.add_node("node")


@pytest.mark.netns
@needs_root
@needs_nft
@pytest.mark.parametrize("plan", PLANS)
def test_the_kernels_own_listing_is_as_wanted_until_somebody_changes_it(
    member: Member, plan: RedirectPlan
) -> None:
    wanted = ruleset_of(nft.replacement(plan))

    def found() -> list[str]:
        with member.netns.call(lambda: NetlinkSocket(nft.NETLINK_NETFILTER)) as sock:
            return differences(wanted, read_ruleset(sock), TABLE_NAMES)

    def write() -> None:
        with member.netns.call(lambda: NetlinkSocket(nft.NETLINK_NETFILTER)) as sock:
            nft.commit(sock, nft.stamped(plan, "pod x"))

    assert found()
    for change in (
        f"insert rule inet {NAT} istio-output accept",
        f"flush chain inet {NAT} istio-output",
        f"delete table inet {NAT}",
        f"add chain inet {NAT} extra {{ type filter hook input priority 0; }}",
        f"add chain inet {NAT} prerouting {{ policy drop; }}",
    ):
        write()
        assert found() == []
        output_of(member, "nft", *change.split(" "))
        assert found() or "policy" in change
