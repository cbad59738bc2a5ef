from __future__ import annotations

import pytest

from tests.support.builders import a_workload
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.workload import NetworkMode, TunnelProtocol, Workload, WorkloadUid
from ztunnel.state.workloads import Workloads

HBONE = TunnelProtocol.HBONE
HERE = Network("")
IP = parse_ip("192.0.2.10")


def stored(*workloads: Workload, node: str = "") -> Workloads:
    found = Workloads(node)
    for workload in workloads:
        found.put(workload)
    return found


def mine(workloads: Workloads, name: str = "cart-0", sa: str = "default") -> Workload | None:
    return workloads.local(
        name=name, namespace=Namespace("shop"), service_account=ServiceAccount(sa)
    )


def test_a_workload_is_found_by_uid_address_and_host_name() -> None:
    pod = a_workload(ips=["192.0.2.10", "2001:db8::10"], hostname="cart.example.com")
    workloads = stored(pod)
    assert workloads.by_uid(pod.uid) == pod
    assert workloads.by_address(HERE, IP) == pod
    assert workloads.by_address(HERE, parse_ip("2001:db8::10")) == pod
    assert workloads.by_hostname(Namespace("shop"), "cart.example.com") == pod
    assert list(workloads.all()) == [pod]
    assert len(workloads) == 1


def test_what_is_not_there_is_none() -> None:
    workloads = stored(a_workload(hostname="cart.example.com"))
    assert workloads.by_uid(WorkloadUid("other")) is None
    assert workloads.by_address(Network("far"), IP) is None
    assert workloads.by_address(HERE, parse_ip("192.0.2.11")) is None
    assert workloads.by_hostname(Namespace("bank"), "cart.example.com") is None
    assert workloads.remove(WorkloadUid("other")) is None


def test_host_network_workloads_own_no_address() -> None:
    pod = a_workload(network_mode=NetworkMode.HOST_NETWORK)
    workloads = stored(pod)
    assert workloads.by_address(HERE, IP) is None
    assert workloads.remove(pod.uid) == pod


def claimant(uid: str, protocol: TunnelProtocol = TunnelProtocol.NONE) -> Workload:
    return a_workload(uid=uid, protocol=protocol)


OTHER = claimant("entry")
OTHER_HBONE = claimant("vm", HBONE)
POD = claimant("lab//Pod/shop/a")
POD_HBONE = claimant("lab//Pod/shop/b", HBONE)


@pytest.mark.parametrize(
    ("claimants", "winner"),
    [
        ([OTHER, OTHER_HBONE, POD, POD_HBONE], POD_HBONE),
        ([POD_HBONE, POD, OTHER_HBONE, OTHER], POD_HBONE),
        ([OTHER_HBONE, POD], POD),
        ([POD, OTHER_HBONE], POD),
        ([OTHER_HBONE, OTHER], OTHER_HBONE),
        ([claimant("x"), claimant("y")], claimant("y")),
        ([claimant("y"), claimant("x")], claimant("x")),
    ],
)
def test_a_shared_address_goes_to_the_best_claim(
    claimants: list[Workload], winner: Workload
) -> None:
    workloads = stored(*claimants)
    assert workloads.by_address(HERE, IP) == winner


def test_the_next_claim_counts_when_the_winner_goes() -> None:
    workloads = stored(OTHER, POD, POD_HBONE)
    for gone, winner in [(POD_HBONE, POD), (POD, OTHER), (OTHER, None)]:
        workloads.remove(gone.uid)
        assert workloads.by_address(HERE, IP) == winner


def test_a_successor_may_take_the_address_before_the_old_one_goes() -> None:
    old, new = claimant("lab//Pod/shop/old", HBONE), claimant("lab//Pod/shop/new", HBONE)
    workloads = stored(old, new)
    workloads.remove(old.uid)
    assert workloads.by_address(HERE, IP) == new


def test_an_update_moves_a_workload() -> None:
    old = a_workload(hostname="old.example.com", sa="old")
    new = a_workload(hostname="new.example.com", sa="new", ips=["192.0.2.11"])
    workloads = stored(old)
    assert workloads.put(new) == old
    assert workloads.by_address(HERE, IP) is None
    assert workloads.by_address(HERE, parse_ip("192.0.2.11")) == new
    assert workloads.by_hostname(Namespace("shop"), "old.example.com") is None
    assert mine(workloads, sa="old") is None
    assert mine(workloads, sa="new") == new


def test_the_same_address_written_twice_is_one() -> None:
    pod = a_workload(ips=["192.0.2.10", "192.0.2.10"])
    workloads = stored(pod, claimant("vm"))
    assert workloads.by_address(HERE, IP) == pod
    workloads.remove(pod.uid)
    assert workloads.by_address(HERE, IP) == claimant("vm")


def test_only_pods_of_this_node_are_local() -> None:
    here, there = a_workload(node="n1"), a_workload("cart-1", node="n2", sa="other")
    workloads = stored(here, there, node="n1")
    assert mine(workloads) == here
    assert mine(workloads, "cart-1", "other") is None
    assert workloads.is_local(here)
    assert not workloads.is_local(there)


def test_a_pod_of_another_node_leaves_no_trace() -> None:
    there = a_workload(node="n2")
    workloads = stored(there, node="n1")
    assert workloads.remove(there.uid) == there
    assert len(workloads) == 0


def test_without_a_node_name_all_are_local() -> None:
    workloads = stored(a_workload(node="n1"), a_workload("cart-1", node="n2"))
    assert mine(workloads, "cart-1") is not None


@pytest.mark.parametrize(("name", "sa"), [("cart-0", "other"), ("cart-9", "default")])
def test_our_own_needs_name_and_account(name: str, sa: str) -> None:
    assert mine(stored(a_workload()), name, sa) is None


def test_of_two_with_one_name_the_latest_is_ours() -> None:
    old, new = a_workload(uid="old"), a_workload(uid="new")
    assert mine(stored(old, new)) == new


def test_all_uids_are_there_once_in_parts() -> None:
    pods = [a_workload(f"cart-{number}") for number in range(200)]
    parts = stored(*pods).uids()
    assert sorted(uid for part in parts for uid in part) == sorted(pod.uid for pod in pods)
    assert len(parts) > 10
    assert all(parts)
    assert stored().uids() == []
