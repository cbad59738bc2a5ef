"""Policies by key, by namespace and for a workload (state-and-xds.md 11)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Self

from ztunnel.model.flow import Flow
from ztunnel.model.identity import Namespace
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.workload import PolicyKey, Workload
from ztunnel.state.policy_index import Entry, PolicyIndex

# Distinct (namespace, policy keys) of the workloads we enforce for; one node has a few hundred.
SETS_MAX = 4096


class PolicySet:
    """The policies that apply to one workload: a live view, true as of now whenever asked."""

    __slots__ = ("_indexes",)

    def __init__(self, indexes: tuple[PolicyIndex, ...]) -> None:
        self._indexes = indexes

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> Self:
        """Make one of these policies, in this order."""
        index = PolicyIndex()
        for policy in policies:
            index.add(policy)
        return cls((index,))

    def all(self) -> Iterator[Policy]:
        """Yield every policy: the namespace's, the global ones, those the workload lists."""
        return chain.from_iterable(index.policies.values() for index in self._indexes)

    def candidates(self, flow: Flow) -> list[Entry]:
        """Return a superset of the rules that match `flow`, in the order of `all`."""
        return [entry for index in self._indexes for entry in index.candidates(flow)]

    def allows(self) -> Iterator[Policy]:
        """Yield the enforced ALLOW policies: with any of them, silence means no."""
        return chain.from_iterable(index.allows.values() for index in self._indexes)

    @property
    def has_allow(self) -> bool:
        """Tell whether there is an enforced ALLOW policy."""
        return any(index.allows for index in self._indexes)

    @property
    def has_dry_allow(self) -> bool:
        """Tell whether there is an ALLOW policy that is only tried out."""
        return any(index.dry_allows for index in self._indexes)


class Policies:
    """What the control plane told us about policies; `version` counts the changes."""

    def __init__(self) -> None:
        self.version = 0
        self._by_key: dict[PolicyKey, Policy] = {}
        self._global = PolicyIndex()
        self._by_namespace: dict[Namespace, PolicyIndex] = {}
        self._sets: dict[tuple[Namespace, tuple[PolicyKey, ...]], PolicySet] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> Collection[Policy]:
        """Return a live view of all policies."""
        return self._by_key.values()

    def by_key(self, key: PolicyKey) -> Policy | None:
        """Return the policy with this key."""
        return self._by_key.get(key)

    def missing(self, workload: Workload) -> tuple[PolicyKey, ...]:
        """Return the policies the workload lists that we do not (yet) have.

        The reference skips them, so a workload with only an ALLOW is open until it arrives
        (dataplane.md 17.25); the caller can wait or refuse instead.
        """
        return tuple(key for key in workload.policies if key not in self._by_key)

    def for_workload(self, workload: Workload) -> PolicySet:
        """Return the policies that apply to a destination workload.

        Those of its namespace, the global ones and those it lists; the last are looked at
        once per distinct list and remembered until one of them changes.
        """
        question = (workload.namespace, workload.policies)
        found = self._sets.get(question)
        if found is None:
            if len(self._sets) >= SETS_MAX:
                self._sets.clear()
            found = self._sets[question] = self._assemble(*question)
        return found

    def _assemble(self, namespace: Namespace, keys: tuple[PolicyKey, ...]) -> PolicySet:
        listed = PolicyIndex()
        for key in dict.fromkeys(keys):
            policy = self._by_key.get(key)
            if policy is not None and not _applies_anyway(policy, namespace):
                listed.add(policy)
        own = self._by_namespace.get(namespace)
        scopes = (own, self._global, listed)
        return PolicySet(tuple(index for index in scopes if index is not None))

    def put(self, policy: Policy) -> Policy | None:
        """Store one policy, moving it if its scope changed, and return what it replaced."""
        old = self.remove(policy.key)
        self.version += 1
        self._by_key[policy.key] = policy
        match policy.scope:
            case PolicyScope.GLOBAL:
                self._global.add(policy)
            case PolicyScope.NAMESPACE:
                self._namespace_index(policy.namespace).add(policy)
            case PolicyScope.WORKLOAD_SELECTOR:
                pass  # found through the workloads that list it
        self._forget(lambda _, keys: policy.key in keys)
        return old

    def remove(self, key: PolicyKey) -> Policy | None:
        """Forget one policy and return it; None when it was unknown."""
        old = self._by_key.pop(key, None)
        if old is None:
            return None
        self.version += 1
        self._global.remove(key)
        index = self._by_namespace.get(old.namespace)
        if index is not None:
            index.remove(key)
            if not index.policies:
                # Sets that still hold it find nothing in it, and go when it has a successor.
                del self._by_namespace[old.namespace]
        self._forget(lambda _, keys: key in keys)
        return old

    def _namespace_index(self, namespace: Namespace) -> PolicyIndex:
        index = self._by_namespace.get(namespace)
        if index is None:
            index = self._by_namespace[namespace] = PolicyIndex()
            self._forget(lambda asked, _: asked == namespace)
        return index

    def _forget(self, is_stale: Callable[[Namespace, tuple[PolicyKey, ...]], bool]) -> None:
        """Drop the remembered sets that a change has made wrong."""
        for question in [asked for asked in self._sets if is_stale(*asked)]:
            del self._sets[question]


def _applies_anyway(policy: Policy, namespace: Namespace) -> bool:
    """Tell whether a policy applies to `namespace` without being listed by a workload."""
    match policy.scope:
        case PolicyScope.GLOBAL:
            return True
        case PolicyScope.NAMESPACE:
            return policy.namespace == namespace
        case PolicyScope.WORKLOAD_SELECTOR:
            return False
