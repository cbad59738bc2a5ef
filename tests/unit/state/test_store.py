from __future__ import annotations

from collections.abc import Collection
from typing import Any
from unittest import mock

from hypothesis import given, strategies as st

from tests.support.builders import a_cidr_vip, a_policy, a_service, a_store, a_workload, allow, deny
from ztunnel.model.identity import Namespace
from ztunnel.model.network import IpAddress, Network, parse_ip
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.service import HealthPolicy, LoadBalancer, Service, Visibility
from ztunnel.model.workload import (
    Health,
    NamespacedHostname,
    NetworkMode,
    PolicyKey,
    ServiceKey,
    Workload,
    WorkloadUid,
)
from ztunnel.state import store as store_module
from ztunnel.state.policies import STAGED_MIN, STAGED_PER_STEP
from ztunnel.state.store import Changes, Store, Update

HERE = Network("")
POD = a_workload()
CART = a_service(vips=["10.0.0.1"])
ONLY_FRONTEND = a_policy()


def test_an_update_is_applied_as_a_whole_and_told_once() -> None:
    store = Store()
    told: list[Changes] = []
    store.subscribe(told.append)
    update = Update(workloads=[POD], services=[CART], policies=[ONLY_FRONTEND])
    changes = store.apply(update)
    assert changes == Changes({POD.uid}, {CART.key}, {ONLY_FRONTEND.key})
    assert told == [changes]
    assert store.version == 1


def test_what_is_sent_again_unchanged_changes_nothing() -> None:
    store = a_store(POD, CART, ONLY_FRONTEND)
    told: list[Changes] = []
    store.subscribe(told.append)
    changes = store.apply(Update(workloads=[POD], services=[CART], policies=[ONLY_FRONTEND]))
    assert not changes
    assert told == []
    assert store.version == 1


def test_listeners_see_the_new_state_and_can_leave() -> None:
    store = Store()
    seen: list[int] = []
    leave = store.subscribe(lambda _: seen.append(len(store.workloads)))
    store.apply(Update(workloads=[POD]))
    leave()
    leave()
    store.apply(Update(removed_workloads=[POD.uid]))
    assert seen == [1]


def test_a_listener_may_leave_while_being_told() -> None:
    store = Store()
    told: list[str] = []

    def once(_: Changes) -> None:
        told.append("once")
        leave()

    leave = store.subscribe(once)
    store.subscribe(lambda _: told.append("always"))
    store.apply(Update(workloads=[POD]))
    store.apply(Update(removed_workloads=[POD.uid]))
    assert told == ["once", "always", "always"]


def test_removals_are_told_and_unknown_ones_are_not() -> None:
    store = a_store(POD, CART, ONLY_FRONTEND)
    changes = store.apply(
        Update(
            removed_workloads=[POD.uid, WorkloadUid("unknown")],
            removed_services=[CART.key, ServiceKey("unknown")],
            removed_policies=[ONLY_FRONTEND.key, PolicyKey("unknown")],
        )
    )
    assert changes == Changes({POD.uid}, {CART.key}, {ONLY_FRONTEND.key})
    assert not store.workloads.all()


def test_a_pod_s_successor_takes_its_address_in_one_update() -> None:
    old, new = a_workload(uid="old"), a_workload(uid="new")
    store = a_store(old)
    store.apply(Update(workloads=[new], removed_workloads=[old.uid]))
    assert store.workloads.by_address(HERE, parse_ip("192.0.2.10")) == new


def test_something_removed_and_put_is_put() -> None:
    store = a_store(POD)
    store.apply(Update(workloads=[POD], removed_workloads=[POD.uid]))
    assert store.workloads.by_uid(POD.uid) == POD


def test_replacing_all_forgets_what_is_not_named() -> None:
    gone = a_workload("gone", ips=["192.0.2.20"])
    other = a_service("other")
    store = a_store(POD, gone, CART, other, allow("a/b"), deny("a/b"))
    changes = store.apply(
        Update(workloads=[POD], services=[CART], policies=[deny("a/b")], replace_all=True)
    )
    assert changes == Changes({gone.uid}, {other.key}, {allow("a/b").key})
    assert list(store.workloads.all()) == [POD]


def test_an_address_is_a_workload_s_before_it_is_a_service_s() -> None:
    both = a_service("both", vips=["192.0.2.10"])
    store = a_store(POD, CART, both)
    assert store.at_address(HERE, parse_ip("192.0.2.10")) == POD
    assert store.at_address(HERE, parse_ip("10.0.0.1")) == CART
    assert store.at_address(HERE, parse_ip("10.0.0.9")) is None


def test_a_name_is_a_service_s_before_it_is_a_workload_s() -> None:
    namesake = a_workload("vm", hostname=CART.hostname)
    alone = a_workload("db", hostname="db.example.com")
    store = a_store(namesake, alone, CART)
    shop = Namespace("shop")
    assert store.at_hostname(NamespacedHostname(shop, CART.hostname)) == CART
    assert store.at_hostname(NamespacedHostname(shop, "db.example.com")) == alone
    assert store.at_hostname(NamespacedHostname(shop, "unknown")) is None


def test_the_node_decides_who_is_local() -> None:
    store = Store(node="n1")
    elsewhere = a_workload(node="n2")
    store.apply(Update(workloads=[elsewhere]))
    assert not store.workloads.is_local(elsewhere)


# The store against a naive model: three dictionaries and plain scans.

IPS = ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
KEYS = [f"{ns}/{host}" for ns in ("shop", "bank") for host in ("a.example.com", "b.example.com")]

workloads = st.builds(
    a_workload,
    st.just("w"),
    uid=st.sampled_from(["u1", "lab//Pod/shop/u2", "u3", "u4"]),
    ns=st.sampled_from(["shop", "bank"]),
    ips=st.lists(st.sampled_from(IPS), max_size=2),
    network=st.sampled_from(["", "far"]),
    hostname=st.sampled_from(["", "h.example.com"]),
    network_mode=st.sampled_from(NetworkMode),
    health=st.sampled_from(Health),
    services=st.dictionaries(st.sampled_from(KEYS), st.just({80: 8080}), max_size=3),
)


def make_service(key: str, **more: Any) -> Service:
    ns, _, hostname = key.partition("/")
    return a_service(hostname, ns=ns, **more)


services = st.builds(
    make_service,
    st.sampled_from(KEYS),
    vips=st.lists(st.sampled_from(IPS), max_size=2),
    cidrs=st.lists(st.sampled_from(["192.0.2.0/24", "192.0.2.0/31", "::/0"]), max_size=2),
    visibility=st.sampled_from(Visibility),
    load_balancer=st.sampled_from([None, LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL)]),
)
policies = st.builds(
    a_policy, st.sampled_from("ab"), scope=st.sampled_from(PolicyScope), dry_run=st.booleans()
)
updates = st.builds(
    Update,
    workloads=st.lists(workloads, max_size=3, unique_by=lambda w: w.uid),
    services=st.lists(services, max_size=2, unique_by=lambda s: s.key),
    policies=st.lists(policies, max_size=2, unique_by=lambda p: p.key),
    removed_workloads=st.lists(st.sampled_from(["u1", "lab//Pod/shop/u2", "u3", "u4"]), max_size=2),
    removed_services=st.lists(st.sampled_from(KEYS), max_size=2),
    removed_policies=st.lists(st.sampled_from(["shop/a", "shop/b"]), max_size=1),
    replace_all=st.sampled_from([False, False, False, True]),
)


class Model:
    """What a store should be: dictionaries, and scans over them."""

    def __init__(self) -> None:
        self.workloads: dict[str, Workload] = {}
        self.services: dict[str, Service] = {}
        self.policies: dict[str, Policy] = {}

    def apply(self, update: Update) -> None:
        tables: list[tuple[dict[Any, Any], dict[Any, Any], Collection[str]]] = [
            (self.workloads, {w.uid: w for w in update.workloads}, update.removed_workloads),
            (self.services, {s.key: s for s in update.services}, update.removed_services),
            (self.policies, {p.key: p for p in update.policies}, update.removed_policies),
        ]
        for known, put, removed in tables:
            for key in list(known) if update.replace_all else removed:
                known.pop(key, None)
            known.update(put)

    def owners(self, network: Network, ip: IpAddress) -> set[str]:
        claims = [
            w
            for w in self.workloads.values()
            if w.network == network
            and ip in w.ips
            and w.network_mode is not NetworkMode.HOST_NETWORK
        ]
        best = max(("//Pod/" in w.uid for w in claims), default=False)
        return {w.uid for w in claims if ("//Pod/" in w.uid) == best}

    def sharers(self, ip: IpAddress, client: Namespace) -> set[str]:
        seen = [
            s
            for s in self.services.values()
            if s.visibility is Visibility.PUBLIC or s.namespace == client
        ]
        exact = [s for s in seen if any(vip.ip == ip for vip in s.vips)]
        lengths = {
            s.key: max((c.cidr.prefixlen for c in s.cidr_vips if ip in c.cidr), default=-1)
            for s in seen
        }
        pool = exact or [s for s in seen if lengths[s.key] >= 0]
        at_home = [s for s in pool if s.namespace == client]
        pool = at_home or pool
        longest = max((lengths[s.key] for s in pool), default=0)
        return {s.key for s in pool if exact or lengths[s.key] == longest}

    def endpoints(self, service: Service) -> set[str]:
        takes_all = service.load_balancer is not None
        return {
            w.uid
            for w in self.workloads.values()
            if service.key in w.services and (takes_all or w.health is Health.HEALTHY)
        }


def agrees(found: str | None, expected: Collection[str]) -> bool:
    """One of the equally good, or nobody if there is none."""
    return found in expected if expected else found is None


def check(store: Store, model: Model) -> None:
    assert {w.uid: w for w in store.workloads.all()} == model.workloads
    assert {s.key: s for s in store.services.all()} == model.services
    assert {p.key: p for p in store.policies.all()} == model.policies
    for ip in map(parse_ip, [*IPS, "192.0.2.9"]):
        for network in (HERE, Network("far")):
            owner = store.workloads.by_address(network, ip)
            assert agrees(owner.uid if owner else None, model.owners(network, ip))
        for client in (Namespace("shop"), Namespace("else")):
            service = store.services.by_vip(HERE, ip, client)
            assert agrees(service.key if service else None, model.sharers(ip, client))
    for service in model.services.values():
        assert {w.uid for w in store.services.endpoints(service)} == model.endpoints(service)
    staged = {key for w in model.workloads.values() for key in w.services} - set(model.services)
    assert set(store.services.staged()) == staged
    for ns in (Namespace("shop"), Namespace("bank")):
        named = store.workloads.by_hostname(ns, "h.example.com")
        expected = {w.uid for w in model.workloads.values() if w.namespace == ns and w.hostname}
        assert agrees(named.uid if named else None, expected)


@given(sequence=st.lists(updates, max_size=6))
def test_the_store_agrees_with_a_naive_model(sequence: list[Update]) -> None:
    store, model = Store(), Model()
    for update in sequence:
        store.apply(update)
        model.apply(update)
        check(store, model)


@given(sequence=st.lists(updates.filter(lambda update: not update.replace_all), max_size=6))
def test_a_store_that_rests_meanwhile_agrees_too(sequence: list[Update]) -> None:
    store, model = Store(), Model()
    told: list[Changes] = []
    store.subscribe(told.append)
    with mock.patch.object(store_module, "STAGED_MIN", 0):  # as if each were a large one
        for update in sequence:
            told.clear()
            before = model.policies.copy()
            model.apply(update)
            steps = store.applying(update)
            for _ in steps:
                assert {p.key: p for p in store.policies.all()} in (before, model.policies)
            check(store, model)
            changed = {
                key
                for key in before.keys() | model.policies.keys()
                if before.get(key) != model.policies.get(key)
            }
            assert [changes.policies for changes in told if changes.policies] == [changed] * bool(
                changed
            )


def test_a_change_of_policies_that_another_overtakes_is_made_all_the_same() -> None:
    store = Store()
    count = STAGED_MIN + STAGED_PER_STEP
    steps = store.applying(Update(policies=[a_policy(f"p-{n}") for n in range(count)]))
    next(steps)
    store.apply(Update(policies=[a_policy("other")]))
    list(steps)
    assert len(store.policies) == count + 1


@given(sequence=st.lists(updates, max_size=4))
def test_an_emptied_store_is_as_new(sequence: list[Update]) -> None:
    store = Store()
    for update in sequence:
        store.apply(update)
    store.apply(Update(replace_all=True))
    check(store, Model())
    assert store.services.by_vip(HERE, a_cidr_vip("192.0.2.0/24").cidr[1]) is None
