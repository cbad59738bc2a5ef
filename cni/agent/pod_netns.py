"""Find and check a pod's network namespace (cni.md 3.5, 3.7 and 3.9).

How it works: the plugin says which it is, or the container runtime does, or we look through the
processes of the node. Whoever says so, it is the pod's only if it is a network namespace, not the
host's, and has one of the pod's addresses. A process can only be asked for its namespace while it
lives, so everything is opened first and checked on the open descriptor.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from cni.agent.cgroup import TEXT_CHARS_MAX, pod_uid
from cni.agent.errors import NetnsError
from cni.redirect.routes import NETLINK_ROUTE
from ztunnel.linux.netlink import NLM_F_DUMP, NetlinkSocket, attributes_in, encode
from ztunnel.linux.netns import CLONE_NEWNET, NetnsId, PodNetns
from ztunnel.model.network import IpAddress, canonical
from ztunnel.model.workload import PodUid

_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_GET_ADDRESS = 22  # RTM_GETADDR
_ADDRESS_HEAD_BYTES = 8  # struct ifaddrmsg
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_ADDRESS_BYTES = (4, 16)
_START_TIME_FIELD = 19  # of /proc/<pid>/stat after the command's name: the 22nd of all

Wanted = Mapping[PodUid, Iterable[IpAddress]]


@dataclass(frozen=True, slots=True)
class NodeView:
    """How we see the node: its processes, its files, its own namespace.

    `roots`: prefixes under which a path that the runtime reports may lie, best first.
    """

    proc: Path
    roots: tuple[Path, ...]
    host: NetnsId

    def open_reported(self, path: str) -> PodNetns:
        """Open a namespace by the path the runtime reports. The caller closes it.

        Raises:
            NetnsError: it is not there.
        """
        relative = path.lstrip("/")
        if not relative or ".." in Path(relative).parts:
            raise NetnsError(f"not a path of a namespace: {path!r}")
        problems = []
        for root in self.roots:
            try:
                fd = os.open(root / relative, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except (OSError, ValueError) as exc:
                problems.append(str(exc))
            else:
                return PodNetns(fd)
        raise NetnsError(f"cannot open namespace {path}: {'; '.join(problems)}")

    def check(self, netns: PodNetns, ips: Iterable[IpAddress]) -> None:
        """Make sure that a namespace can be that of a pod with these addresses.

        Without addresses only the kind of namespace is checked.

        Raises:
            NetnsError: it is none, it is the host's, or it has none of the addresses.
        """
        if netns.id == self.host:
            raise NetnsError("that is the host's own network namespace")
        if not is_network_namespace(netns.fileno()):
            raise NetnsError("that is not a network namespace")
        wanted = frozenset(ips)
        if wanted and not wanted & addresses_in(netns):
            shown = ", ".join(sorted(map(str, wanted)))
            raise NetnsError(f"the namespace has none of the pod's addresses {shown}")

    def open_sandboxes(
        self, paths: Mapping[PodUid, str], wanted: Wanted
    ) -> tuple[dict[PodUid, PodNetns], list[str]]:
        """Open the namespaces that the runtime says are these pods'; say which cannot be.

        Blocks: call it from a thread. The caller closes what it gets.
        """
        found: dict[PodUid, PodNetns] = {}
        problems = []
        for uid, path in paths.items():
            try:
                netns = self.open_reported(path)
            except NetnsError as exc:
                problems.append(str(exc))
                continue
            if self._is_good(netns, wanted[uid]):
                found[uid] = netns
            else:
                netns.close()
                problems.append(f"{path} has none of the addresses of pod {uid}")
        return found, problems

    def find(self, wanted: Wanted) -> dict[PodUid, PodNetns]:
        """Look through all processes for those of these pods. The caller closes what it gets.

        Blocks for some 10 us a process: call it from a thread. Of several namespaces of a pod
        the one of its oldest process counts, because later ones may be an application's own.
        """
        best: dict[PodUid, tuple[int, PodNetns]] = {}
        refused: set[tuple[PodUid, NetnsId]] = set()
        for pid in self._pids():
            found = self._candidate(pid, wanted)
            if found is None:
                continue
            uid, started, netns = found
            held = best.get(uid)
            if (held and (held[0] <= started or held[1].id == netns.id)) or (
                (uid, netns.id) in refused
            ):
                netns.close()
            elif not self._is_good(netns, wanted[uid]):
                refused.add((uid, netns.id))
                netns.close()
            else:
                if held:
                    held[1].close()
                best[uid] = started, netns
        return {uid: netns for uid, (_, netns) in best.items()}

    def _pids(self) -> Iterator[str]:
        try:
            names = os.listdir(self.proc)  # noqa: PTH208 - names are all we need, and fast
        except OSError:
            return
        yield from sorted((name for name in names if name.isdigit()), key=int)

    def _candidate(self, pid: str, wanted: Wanted) -> tuple[PodUid, int, PodNetns] | None:
        """Read whose process it is; None if nobody's we look for, or it ended meanwhile."""
        folder = self.proc / pid
        try:
            status = (folder / "ns/net").stat()
            if NetnsId(status.st_ino, status.st_dev) == self.host:
                return None
            with (folder / "cgroup").open(encoding="utf-8", errors="replace") as file:
                uid = pod_uid(file.read(TEXT_CHARS_MAX))
            if uid is None or uid not in wanted:
                return None
            started = start_time((folder / "stat").read_text(encoding="utf-8", errors="replace"))
            return uid, started, PodNetns.open(folder / "ns/net")
        except (OSError, ValueError, IndexError):
            return None

    def _is_good(self, netns: PodNetns, ips: Iterable[IpAddress]) -> bool:
        # Without an address to look for, a process that only passes through could mislead us.
        wanted = tuple(ips)
        if not wanted:
            return False
        try:
            self.check(netns, wanted)
        except NetnsError:
            return False
        return True


def start_time(stat: str) -> int:
    """Read when a process began, in clock ticks since boot (proc(5)).

    Raises:
        ValueError: the text is none of `/proc/<pid>/stat`.
    """
    _, parenthesis, rest = stat.rpartition(")")
    fields = rest.split()
    if not parenthesis or len(fields) <= _START_TIME_FIELD:
        raise ValueError("not a process's stat")
    return int(fields[_START_TIME_FIELD])


def is_network_namespace(fd: int) -> bool:
    """Whether a descriptor is open on a network namespace."""
    try:
        return bool(fcntl.ioctl(fd, _NS_GET_NSTYPE) == CLONE_NEWNET)
    except OSError:
        return False


def addresses_in(netns: PodNetns) -> frozenset[IpAddress]:
    """Read all addresses of a namespace's interfaces.

    Raises:
        NetnsError: they cannot be read.
    """
    message = ifaddrmsg()
    message["family"] = 0
    try:
        with netns.call(lambda: NetlinkSocket(NETLINK_ROUTE)) as sock:
            bodies = sock.dump(encode(message, kind=_GET_ADDRESS, flags=NLM_F_DUMP, sequence=1))
    except OSError as exc:
        raise NetnsError(f"cannot read a namespace's addresses: {exc}") from exc
    return frozenset(
        canonical(ip_address(value))
        for body in bodies
        for kind, value in attributes_in(body[_ADDRESS_HEAD_BYTES:])
        if kind in (_IFA_ADDRESS, _IFA_LOCAL) and len(value) in _ADDRESS_BYTES
    )
