"""Workloads by uid, by network address, by host name, and our own by name (state-and-xds.md 9.1).

Every lookup is one or two dictionary reads, however many workloads there are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias, TypeVar

from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import IpAddress, Network
from ztunnel.model.split_map import MASK, PARTS, SplitMap
from ztunnel.model.workload import NetworkMode, TunnelProtocol, Workload, WorkloadUid
from ztunnel.state.addresses import address_key

K = TypeVar("K")

_RANKS = 4


def _rank(workload: Workload) -> int:
    """Rank the claim to a shared address: pod and HBONE 3, pod 2, HBONE 1, else 0."""
    is_pod = "//Pod/" in workload.uid
    return 2 * is_pod + (workload.protocol is TunnelProtocol.HBONE)


class _SharedAddress:
    """The workloads of one address; the best claim wins, the latest among equals."""

    __slots__ = ("_by_rank",)

    def __init__(self) -> None:
        self._by_rank: tuple[dict[WorkloadUid, Workload], ...] = tuple({} for _ in range(_RANKS))

    def add(self, workload: Workload) -> None:
        self._by_rank[_rank(workload)][workload.uid] = workload

    def discard(self, workload: Workload) -> None:
        self._by_rank[_rank(workload)].pop(workload.uid, None)

    def winner(self) -> Workload | None:
        for claims in reversed(self._by_rank):
            if claims:
                return next(reversed(claims.values()))
        return None


_Addresses: TypeAlias = "dict[int, Workload | _SharedAddress]"


class Workloads:
    """What the control plane told us about workloads; `node` is our own, "" counts all as ours."""

    def __init__(self, node: str = "") -> None:
        self._node = node
        self._by_uid: SplitMap[WorkloadUid, Workload] = SplitMap()
        # Nearly every address has one owner: it is stored bare to save memory.
        # Split like `_by_uid`, but each part by networks again: there may be very many small ones.
        self._by_address: tuple[dict[Network, _Addresses], ...] = tuple({} for _ in range(PARTS))
        self._by_hostname: dict[tuple[str, str], dict[WorkloadUid, Workload]] = {}
        self._local: dict[tuple[str, str, str], dict[WorkloadUid, Workload]] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def all(self) -> Collection[Workload]:
        """Return a live view of all workloads."""
        return self._by_uid.values()

    def uids(self) -> list[Collection[WorkloadUid]]:
        """Return live views of all uids in parts, so that whoever has time looks at one by one."""
        return [part.keys() for part in self._by_uid.parts if part]

    def by_uid(self, uid: WorkloadUid) -> Workload | None:
        """Return the workload with this uid."""
        return self._by_uid.parts[hash(uid) & MASK].get(uid)

    def by_address(self, network: Network, ip: IpAddress) -> Workload | None:
        """Return whom this address belongs to; host-network workloads own none."""
        key = address_key(ip)
        addresses = self._by_address[key & MASK].get(network)
        if addresses is None:
            return None
        owner = addresses.get(key)
        return owner.winner() if isinstance(owner, _SharedAddress) else owner

    def by_hostname(self, namespace: Namespace, hostname: str) -> Workload | None:
        """Return the first workload with this host name in this namespace."""
        found = self._by_hostname.get((namespace, hostname))
        return next(iter(found.values())) if found else None

    def local(
        self, *, name: str, namespace: Namespace, service_account: ServiceAccount
    ) -> Workload | None:
        """Return the workload of this node with exactly this name, namespace and account."""
        found = self._local.get((namespace, service_account, name))
        return next(reversed(found.values())) if found else None

    def is_local(self, workload: Workload) -> bool:
        """Tell whether the workload runs on this node."""
        return not self._node or workload.node == self._node

    def put(self, workload: Workload) -> Workload | None:
        """Store one workload and return what it replaced."""
        uid = workload.uid
        known = self._by_uid.parts[hash(uid) & MASK]
        old = self.remove(uid) if uid in known else None
        known[uid] = workload
        if workload.network_mode is not NetworkMode.HOST_NETWORK:
            for ip in workload.ips:
                self._claim(address_key(ip), workload)
        if workload.hostname:
            _file(self._by_hostname, (workload.namespace, workload.hostname), workload)
        if self.is_local(workload):
            _file(
                self._local, (workload.namespace, workload.service_account, workload.name), workload
            )
        return old

    def remove(self, uid: WorkloadUid) -> Workload | None:
        """Forget one workload and return it; None when it was unknown."""
        old = self._by_uid.of(uid).pop(uid, None)
        if old is None:
            return None
        if old.network_mode is not NetworkMode.HOST_NETWORK:
            for ip in old.ips:
                self._release(address_key(ip), old)
        if old.hostname:
            _unfile(self._by_hostname, (old.namespace, old.hostname), old)
        if self.is_local(old):
            _unfile(self._local, _who(old), old)
        return old

    def _claim(self, key: int, workload: Workload) -> None:
        networks = self._by_address[key & MASK]
        addresses = networks.get(workload.network)
        if addresses is None:
            addresses = networks[workload.network] = {}
        owner = addresses.setdefault(key, workload)
        if owner is workload:
            return
        if not isinstance(owner, _SharedAddress):
            addresses[key] = shared = _SharedAddress()
            shared.add(owner)
            owner = shared
        owner.add(workload)

    def _release(self, key: int, old: Workload) -> None:
        networks = self._by_address[key & MASK]
        addresses = networks.get(old.network, {})  # without it if the address was named twice
        owner = addresses.get(key)
        if isinstance(owner, _SharedAddress):
            owner.discard(old)
            if owner.winner() is None:
                del addresses[key]
        elif owner is old:
            del addresses[key]
        if not addresses:
            networks.pop(old.network, None)


def _file(index: dict[K, dict[WorkloadUid, Workload]], key: K, workload: Workload) -> None:
    index.setdefault(key, {})[workload.uid] = workload


def _unfile(index: dict[K, dict[WorkloadUid, Workload]], key: K, workload: Workload) -> None:
    filed = index[key]
    del filed[workload.uid]
    if not filed:
        del index[key]


def _who(workload: Workload) -> tuple[str, str, str]:
    return workload.namespace, workload.service_account, workload.name
