from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import NOBODY, a_flow, a_policy, a_workload, allow, deny
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.workload import PolicyKey, Workload
from ztunnel.state.policies import (
    SETS_MAX,
    STAGED_PER_STEP,
    Policies,
    PolicySet,
    StagedPolicies,
)
from ztunnel.state.policy_index import PolicyIndex

GLOBAL, NAMESPACE = PolicyScope.GLOBAL, PolicyScope.NAMESPACE
POD = a_workload()


def stored(*policies: Policy) -> Policies:
    found = Policies()
    for policy in policies:
        found.put(policy)
    return found


def names(policies: Policies, workload: Workload) -> list[str]:
    return [policy.name for policy in policies.for_workload(workload).all()]


def test_a_workload_has_those_of_its_namespace_the_global_ones_and_those_it_lists() -> None:
    policies = stored(
        a_policy("ours", scope=NAMESPACE),
        a_policy("theirs", ns="bank", scope=NAMESPACE),
        a_policy("everybody's", ns="istio-system", scope=GLOBAL),
        a_policy("listed"),
        a_policy("not-listed"),
    )
    pod = a_workload(policies=["shop/listed", "shop/missing"])
    assert names(policies, pod) == ["ours", "everybody's", "listed"]
    assert policies.missing(pod) == ("shop/missing",)
    assert len(policies) == len(policies.all()) == 5


def test_a_listed_policy_that_applies_anyway_counts_once() -> None:
    policies = stored(a_policy("a", scope=NAMESPACE), a_policy("b", scope=GLOBAL))
    assert names(policies, a_workload(policies=["shop/a", "shop/b"])) == ["a", "b"]


def test_a_listed_policy_of_another_namespace_counts() -> None:
    policies = stored(a_policy("strict", ns="istio-system", scope=NAMESPACE))
    assert names(policies, a_workload(policies=["istio-system/strict"])) == ["strict"]


def test_every_change_is_seen() -> None:
    policies = stored()
    pod = a_workload(policies=["shop/p", "shop/p"])
    assert names(policies, pod) == []
    policies.put(a_policy("p"))
    assert names(policies, pod) == ["p"]
    policies.put(a_policy("p", scope=NAMESPACE))
    assert names(policies, pod) == names(policies, POD) == ["p"]
    policies.put(a_policy("p", scope=GLOBAL))
    assert names(policies, pod) == names(policies, a_workload(ns="bank")) == ["p"]
    policies.put(a_policy("p"))
    assert names(policies, pod) == ["p"]
    assert names(policies, POD) == []
    policies.remove(PolicyKey("shop/p"))
    assert names(policies, pod) == []


def test_the_version_counts_changes() -> None:
    policies = stored(a_policy("p"))
    before = policies.version
    policies.remove(PolicyKey("shop/unknown"))
    assert policies.version == before
    policies.remove(PolicyKey("shop/p"))
    assert policies.version > before
    assert policies.by_key(PolicyKey("shop/p")) is None


def test_put_returns_what_it_replaced() -> None:
    old, new = allow("a/b", name="p"), deny("a/b", name="p")
    policies = Policies()
    assert policies.put(old) is None
    assert policies.put(new) == old
    assert policies.by_key(new.key) == new


def test_workloads_with_endless_lists_do_not_fill_the_memory() -> None:
    policies = stored(a_policy("p"))
    for number in range(SETS_MAX + 1):
        policies.for_workload(a_workload(policies=[f"shop/{number}"]))
    assert names(policies, a_workload(policies=["shop/p"])) == ["p"]


def test_a_set_knows_whether_silence_means_no() -> None:
    assert not PolicySet.of([]).has_allow
    assert not PolicySet.of([deny("a/b")]).has_allow
    assert PolicySet.of([allow("a/b")]).has_allow
    dry = PolicySet.of([allow("a/b", dry_run=True)])
    assert (dry.has_allow, dry.has_dry_allow) == (False, True)
    assert [policy.name for policy in PolicySet.of([deny("a/b"), allow("c/d")]).allows()] == [
        "allow"
    ]


changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "remove"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["shop", "bank"]),
        st.sampled_from(PolicyScope),
    ),
    max_size=20,
)
pods = [
    a_workload(ns=ns, policies=keys)
    for ns in ("shop", "bank")
    for keys in ([], ["shop/a"], ["shop/a", "bank/b", "shop/c"])
]


@given(changes=changes)
def test_the_sets_agree_with_a_naive_scan(
    changes: list[tuple[str, str, str, PolicyScope]],
) -> None:
    policies = Policies()
    model: dict[PolicyKey, Policy] = {}
    for what, name, ns, scope in changes:
        policy = a_policy(name, ns=ns, scope=scope)
        model.pop(policy.key, None)
        if what == "put":
            policies.put(policy)
            model[policy.key] = policy
        else:
            policies.remove(policy.key)
        for pod in pods:
            expected = {
                p.key
                for p in model.values()
                if p.scope is GLOBAL
                or (p.scope is NAMESPACE and p.namespace == pod.namespace)
                or p.key in pod.policies
            }
            found = policies.for_workload(pod)
            assert {p.key for p in found.all()} == expected
            assert len(found.candidates(a_flow(by=NOBODY))) == len(expected)


# A large change against the same one made policy by policy.


def take(steps: Generator[None, None, StagedPolicies]) -> tuple[StagedPolicies, int]:
    """Stage; say in how many slices."""
    count = 1
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, count
        count += 1


some_policies = st.lists(
    st.builds(
        a_policy,
        st.sampled_from("abcd"),
        ns=st.sampled_from(["shop", "bank"]),
        scope=st.sampled_from(PolicyScope),
        dry_run=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda policy: policy.key,
)
PODS = [
    a_workload("pod", ns=ns, policies=listed)
    for ns in ("shop", "bank", "lab")
    for listed in ([], ["shop/a"], ["bank/a", "shop/b"])
]


@given(
    before=some_policies,
    put=some_policies,
    removed=st.lists(st.sampled_from(["shop/a", "shop/b", "bank/a", "shop/x"]), max_size=3),
    asked=st.sampled_from([[], PODS]),
)
def test_a_staged_change_is_what_its_parts_are_one_by_one(
    before: list[Policy], put: list[Policy], removed: list[PolicyKey], asked: list[Workload]
) -> None:
    plain, policies = stored(*before), stored(*before)
    held = [policies.for_workload(pod) for pod in asked]
    was = [list(each.all()) for each in held]
    staged, _ = take(policies.stage(put, removed))
    assert [list(each.all()) for each in held] == was, "nothing is in force yet"
    assert policies.commit(staged)
    list(staged.take_apart())
    for key in set(removed) - {policy.key for policy in put}:
        plain.remove(key)
    for policy in put:
        if plain.by_key(policy.key) != policy:
            plain.put(policy)
    assert list(policies.all()) == list(plain.all())
    for pod in PODS:
        mine, other = policies.for_workload(pod), plain.for_workload(pod)
        assert list(mine.all()) == list(other.all())
        assert mine.candidates(a_flow()) == other.candidates(a_flow())
        assert list(mine.allows()) == list(other.allows())
        assert mine.has_dry_allow == other.has_dry_allow
    remembered = {question for asked in policies._listing.values() for question in asked}
    assert remembered == {question for question in policies._sets if question[1]}


def test_a_change_that_another_one_overtook_does_not_take_effect() -> None:
    policies = stored(a_policy("a"))
    staged, _ = take(policies.stage([a_policy("b", scope=NAMESPACE)], []))
    policies.put(a_policy("c", scope=NAMESPACE))
    assert not policies.commit(staged)
    assert names(policies, POD) == ["c"]


def test_a_large_change_is_prepared_and_tidied_up_in_slices_and_made_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: list[int] = []
    add = PolicyIndex.add

    def counted(self: PolicyIndex, policy: Policy) -> None:
        added.append(1)
        add(self, policy)

    count = 10 * STAGED_PER_STEP
    # In many namespaces: what matters is how many there are in all.
    spaces = [f"ns-{n % 100}" for n in range(count)]
    policies = stored(*[a_policy(f"p-{n}", ns=ns, scope=NAMESPACE) for n, ns in enumerate(spaces)])
    monkeypatch.setattr(PolicyIndex, "add", counted)
    later = [deny("a/b", name=f"p-{n}", ns=ns, scope=NAMESPACE) for n, ns in enumerate(spaces)]
    steps = policies.stage(later, [])
    most = 0
    while True:
        added.clear()
        try:
            next(steps)
        except StopIteration as done:
            staged = done.value
            break
        most = max(most, len(added))
    assert 0 < most <= STAGED_PER_STEP
    pods = [a_workload(ns=ns) for ns in set(spaces)]
    assert all(policies.for_workload(pod).has_allow for pod in pods)
    added.clear()
    assert policies.commit(staged)
    assert not added
    assert not any(policies.for_workload(pod).has_allow for pod in pods)
    assert sum(1 for _ in staged.take_apart()) == count // STAGED_PER_STEP
