from __future__ import annotations

from hypothesis import given, strategies as st

from tests.support.builders import NOBODY, a_flow, a_policy, a_workload, allow, deny
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.workload import PolicyKey, Workload
from ztunnel.state.policies import SETS_MAX, Policies, PolicySet

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
