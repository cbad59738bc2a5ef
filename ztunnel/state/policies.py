"""Policies by key, by namespace and for a workload (state-and-xds.md 11)."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from itertools import chain
from typing import Self, TypeAlias, TypeGuard

from ztunnel.model.flow import Flow
from ztunnel.model.identity import Namespace
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.workload import PolicyKey, Workload
from ztunnel.state.policy_index import Entry, PolicyIndex

# More changes than so many are staged, as each takes 20 us: what takes long is done before they
# take effect, or after it, in slices.
STAGED_MIN = 32
STAGED_PER_STEP = 8
KEYS_PER_STEP = 100  # only looked up

# Distinct (namespace, policy keys) of the workloads we enforce for; one node has a few hundred.
SETS_MAX = 4096


_Question: TypeAlias = "tuple[Namespace, tuple[PolicyKey, ...]]"


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
        self._sets: dict[_Question, PolicySet] = {}
        self._listing: dict[PolicyKey, set[_Question]] = {}  # of `_sets`, those that list a policy

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
                self._listing.clear()
            found = self._sets[question] = self._assemble(*question)
            for key in workload.policies:
                self._listing.setdefault(key, set()).add(question)
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
        self._forget((policy.key,))
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
            self._drop_if_empty(old.namespace)
        self._forget((key,))
        return old

    def stage(
        self, put: Iterable[Policy], removed: Iterable[PolicyKey]
    ) -> Generator[None, None, StagedPolicies]:
        """Prepare a large change in steps; what is both put and removed is put."""
        staged = StagedPolicies(self.version)
        for number, key in enumerate(removed, 1):
            if key in self._by_key:
                staged.coming[key] = None
            if number % KEYS_PER_STEP == 0:
                yield
        for number, policy in enumerate(put, 1):
            staged.coming.pop(policy.key, None)
            if self._by_key.get(policy.key) != policy:
                staged.coming[policy.key] = policy
            if number % STAGED_PER_STEP == 0:
                yield
        yield from self._find_homes(staged)
        yield from self._index_anew(staged)
        return staged

    def _find_homes(self, staged: StagedPolicies) -> Iterator[None]:
        """Make an index for every scope that changes."""
        for number, (key, coming) in enumerate(staged.coming.items(), 1):
            for policy in (coming, self._by_key.get(key)):
                if _has_home(policy):
                    staged.indexes.setdefault(_home(policy), PolicyIndex())
            if number % KEYS_PER_STEP == 0:
                yield

    def _index_anew(self, staged: StagedPolicies) -> Iterator[None]:
        """Index what stays in these scopes, then what comes."""
        homes = list(staged.indexes)
        there = chain.from_iterable(tuple(self._at_home(home)) for home in homes)
        for number, policy in enumerate(there, 1):
            if policy.key not in staged.coming:
                staged.indexes[_home(policy)].add(policy)
            if number % STAGED_PER_STEP == 0:
                yield
        for number, coming in enumerate(staged.coming.values(), 1):
            if _has_home(coming):
                staged.indexes[_home(coming)].add(coming)
            if number % STAGED_PER_STEP == 0:
                yield

    def commit(self, staged: StagedPolicies) -> bool:
        """Let a staged change take effect, as a whole; False if there was another one meanwhile.

        What held before is then in `staged`, to be taken apart.
        """
        if staged.version != self.version:
            return False
        self.version += bool(staged.coming)
        for key, policy in staged.coming.items():
            self._by_key.pop(key, None)
            if policy is not None:
                self._by_key[key] = policy
        for home, index in staged.indexes.items():
            if home is None:
                self._global.swap(index)
            else:
                self._namespace_index(home).swap(index)
                self._drop_if_empty(home)
        self._forget(staged.coming)
        return True

    def _at_home(self, home: Namespace | None) -> Collection[Policy]:
        index = self._global if home is None else self._by_namespace.get(home)
        return () if index is None else index.policies.values()

    def _namespace_index(self, namespace: Namespace) -> PolicyIndex:
        index = self._by_namespace.get(namespace)
        if index is None:
            index = self._by_namespace[namespace] = PolicyIndex()
            self._drop([question for question in self._sets if question[0] == namespace])
        return index

    def _drop_if_empty(self, namespace: Namespace) -> None:
        if not self._by_namespace[namespace].policies:
            # Sets that still hold it find nothing in it, and go when it has a successor.
            del self._by_namespace[namespace]

    def _forget(self, keys: Iterable[PolicyKey]) -> None:
        """Drop the remembered sets of workloads that list one of these."""
        for key in keys:
            self._drop(list(self._listing.get(key, ())))

    def _drop(self, questions: Iterable[_Question]) -> None:
        for question in questions:
            del self._sets[question]
            for key in set(question[1]):
                self._listing[key].discard(question)
                if not self._listing[key]:
                    del self._listing[key]


class StagedPolicies:
    """A change that is ready to take effect: what comes or, if None, goes, and whole new scopes."""

    def __init__(self, version: int) -> None:
        self.version = version  # what it is a change of
        self.coming: dict[PolicyKey, Policy | None] = {}
        self.indexes: dict[Namespace | None, PolicyIndex] = {}  # None: global

    def take_apart(self) -> Iterator[None]:
        """Free what held before, in steps."""
        done = 0
        for index in self.indexes.values():
            for key in tuple(index.policies):
                index.remove(key)
                done += 1
                if done % STAGED_PER_STEP == 0:
                    yield


def _has_home(policy: Policy | None) -> TypeGuard[Policy]:
    """Tell whether there is a policy, and it is not found through the workloads that list it."""
    return policy is not None and policy.scope is not PolicyScope.WORKLOAD_SELECTOR


def _home(policy: Policy) -> Namespace | None:
    """Name the namespace that a filed policy is for; None if it is for all."""
    return policy.namespace if policy.scope is PolicyScope.NAMESPACE else None


def _applies_anyway(policy: Policy, namespace: Namespace) -> bool:
    """Tell whether a policy applies to `namespace` without being listed by a workload."""
    match policy.scope:
        case PolicyScope.GLOBAL:
            return True
        case PolicyScope.NAMESPACE:
            return policy.namespace == namespace
        case PolicyScope.WORKLOAD_SELECTOR:
            return False
