"""Which endpoint of a headless service a label below its name means (beyond the reference).

A pod is known by its name, and by each of its addresses with dashes. Of several that would have one
label, which can only be in different clusters, the one with the least uid has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from ztunnel.model.network import IpAddress, Network
from ztunnel.model.workload import Health, Workload, WorkloadUid
from ztunnel.state.addresses import address_key

LABEL_CHARS_MAX = 63  # a pod's name may be longer

# A pod's name in lower case, or its address as a number: to write thousands takes far too long.
_Label: TypeAlias = str | int


class _Index:
    """Pods by one kind of label."""

    __slots__ = ("_labels_of", "_others", "by_label")

    def __init__(
        self, labels_of: Callable[[Workload], Sequence[_Label]], pods: Collection[Workload]
    ) -> None:
        self._labels_of = labels_of
        # Who would have a label if it were not for the one that has it.
        self._others: dict[_Label, dict[WorkloadUid, Workload]] = {}
        claims = [(label, pod) for pod in pods for label in labels_of(pod)]
        self.by_label: dict[_Label, Workload] = dict(claims)
        if len(self.by_label) < len(claims):
            self.by_label.clear()
            for pod in pods:
                self.add(pod)

    def add(self, pod: Workload) -> None:
        for label in self._labels_of(pod):
            there = self.by_label.setdefault(label, pod)
            if there is not pod:
                first, second = (pod, there) if pod.uid < there.uid else (there, pod)
                self.by_label[label] = first
                self._others.setdefault(label, {})[second.uid] = second

    def remove(self, pod: Workload) -> None:
        for label in dict.fromkeys(self._labels_of(pod)):
            others = self._others.get(label)
            if others is None:
                del self.by_label[label]
                continue
            if self.by_label[label] is pod:
                self.by_label[label] = others.pop(min(others))
            else:
                del others[pod.uid]
            if not others:
                del self._others[label]


class PodNames:
    """A follower of a service's endpoints (`state.endpoints`) in one network."""

    __slots__ = ("_by_address", "_by_name", "_network", "_pods", "_takes_all")

    def __init__(self, network: Network, members: Iterable[Workload], *, takes_all: bool) -> None:
        self._network = network
        self._takes_all = takes_all
        self._pods = {pod.uid: pod for pod in members if self._counts(pod)}
        self._by_name = _Index(_names, self._pods.values())
        self._by_address: _Index | None = None  # once it is asked for, which is seldom

    def get(self, label: str) -> Workload | None:
        """Return the pod with this label, which is in lower case."""
        named = self._by_name.by_label.get(label)
        if named is not None:
            return named
        ip = _undashed(label)
        if ip is None:
            return None
        if self._by_address is None:
            self._by_address = _Index(_addresses, self._pods.values())
        return self._by_address.by_label.get(address_key(ip))

    def changed(self, uid: WorkloadUid, workload: Workload | None) -> None:
        """Take in a new, changed or, if None, lost endpoint."""
        indexes = [index for index in (self._by_name, self._by_address) if index is not None]
        old = self._pods.pop(uid, None)
        if old is not None:
            for index in indexes:
                index.remove(old)
        if workload is not None and self._counts(workload):
            self._pods[uid] = workload
            for index in indexes:
                index.add(workload)

    def _counts(self, pod: Workload) -> bool:
        is_up = self._takes_all or pod.health is Health.HEALTHY
        return is_up and pod.network == self._network


def label_of(workload: Workload) -> str:
    """Name a pod below its service: by its name, or its address if the name is no label."""
    for name in _names(workload):
        return name
    return _dashed(workload.ips[0]) if workload.ips else ""


def _names(pod: Workload) -> Sequence[str]:
    name = pod.name
    return (name.lower(),) if name and "." not in name and len(name) <= LABEL_CHARS_MAX else ()


def _addresses(pod: Workload) -> Sequence[int]:
    return [address_key(ip) for ip in pod.ips]


def _dashed(ip: IpAddress) -> str:
    """Write an address as a label, as cluster DNS does: one that ended in a dash ends in a zero."""
    label = str(ip).replace(".", "-").replace(":", "-")
    return f"{label}0" if label.endswith("-") else label


def _undashed(label: str) -> IpAddress | None:
    """Read what `_dashed` wrote, and nothing else that looks like it."""
    for family, mark in ((IPv4Address, "."), (IPv6Address, ":")):
        try:
            ip = family(label.replace("-", mark))
        except ValueError:
            continue
        if _dashed(ip) == label:
            return ip
    return None
