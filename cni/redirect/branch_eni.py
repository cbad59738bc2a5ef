"""Rules on the host for pods that AWS gives a network interface of their own (cni.md 5.5).

The CNI of AWS leads the traffic of such a pod ("security groups for pods") through a table of its
own, in both directions, even to and from the host: so kubelet's probes, whose source we rewrite,
are not answered to where they came from. Two rules mend that: what is for the pod takes its table,
and what comes from the pod is first looked for among the host's own addresses. The reference's
sign for such a host is that early demultiplexing is off, which that CNI demands.

A rule is ours if it says so: we make rules with a routing protocol of our own (`ip -d rule` shows
`proto 133`), which the kernel keeps and otherwise ignores, and only in these two forms. So what an
agent left behind that was killed, or that was away when a pod ended, is found by the next one, and
rules like ours of the CNI, of people, or of the reference's agent (which marks nothing) are not
touched, even if they say the same.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol, TypeVar

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.redirect.errors import RedirectError
from cni.redirect.routes import NETLINK_ROUTE
from ztunnel.linux.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NetlinkSocket,
    attributes_in,
    encode,
)
from ztunnel.model.network import IpAddress

T = TypeVar("T")

TO_POD_PREFERENCE = 512
PROTOCOL = 133  # nobody's in iproute2's list; a nod to the mark 1337
_EARLY_DEMUX = Path("/proc/sys/net/ipv4/tcp_early_demux")
_TABLE_MAIN, _TABLE_LOCAL = 254, 255
_USUAL_TABLES = frozenset({_TABLE_MAIN, _TABLE_LOCAL})
_NO_SUCH_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})
_VERSIONS = (4, 6)
_FAMILIES: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_HEAD_BYTES = 12  # struct rtmsg and struct fib_rule_hdr
_HEAD_FAMILY, _HEAD_DST_LEN = 0, 1
_HEAD_TYPE = 7  # where the rule's header has its action
_FRA_DST, _FRA_SUPPRESS_PREFIXLEN, _FRA_PROTOCOL = 1, 14, 21
_UNICAST, _TO_TABLE = 1, 1  # RTN_UNICAST, FR_ACT_TO_TBL
_NEW_RULE, _DELETE_RULE, _GET_RULE, _GET_ROUTE = 32, 33, 34, 26  # RTM_*
_RTA_DST, _RTA_OIF, _RTA_TABLE = 1, 4, 15
_ROUTE_ATTRIBUTES = frozenset({_RTA_DST, _RTA_OIF, _RTA_TABLE})
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE = 3, 6, 15
_OUR_ATTRIBUTES = frozenset(  # the kernel says of every rule how long prefixes must be
    {_FRA_DST, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_PROTOCOL}
)


class Host(Protocol):
    """The host's namespace."""

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` inside and return its result."""


@dataclass(frozen=True, slots=True)
class HostRoute:
    """Where the host sends what is for one address; `interface`: the host's end of a pod's link."""

    ip: IpAddress
    table: int
    interface: str


@dataclass(frozen=True, slots=True)
class InputRule:
    """In which table the host looks up what comes in by an interface."""

    interface: str
    table: int
    preference: int


@dataclass(frozen=True, slots=True)
class OurRule:
    """A rule of ours: for what is sent to an address, or for what comes in by an interface."""

    version: int  # of IP
    selector: IpAddress | str
    table: int
    preference: int

    def __str__(self) -> str:
        word = "iif" if isinstance(self.selector, str) else "to"
        what = f"{word} {self.selector} lookup {self.table} pref {self.preference}"
        return f"IPv{self.version} {what}"


@dataclass(frozen=True, slots=True)
class Detour:
    """The two rules that one pod's address needs."""

    ip: IpAddress
    table: int
    interface: str
    from_pod_preference: int

    @property
    def rules(self) -> tuple[OurRule, OurRule]:
        """Both: to the pod, and from it."""
        version = self.ip.version
        return (
            OurRule(version, self.ip, self.table, TO_POD_PREFERENCE),
            OurRule(version, self.interface, _TABLE_LOCAL, self.from_pod_preference),
        )


def plan_detour(
    ip: IpAddress, routes: Iterable[HostRoute], rules: Iterable[InputRule]
) -> Detour | None:
    """Say which rules an address needs; None if it has no table of its own.

    `routes` and `rules` are those of the address's version.
    """
    mine = {
        (route.interface, route.table)
        for route in routes
        if route.ip == ip and route.table not in _USUAL_TABLES
    }
    for rule in rules:
        if (rule.interface, rule.table) in mine and rule.preference > 0:
            return Detour(ip, rule.table, rule.interface, rule.preference - 1)
    return None


class Detours:
    """Makes and removes the rules of pods' addresses. It blocks: call it from a thread.

    `makes`: whether rules may be made at all; those of an earlier agent are removed in any case.
    """

    def __init__(self, host: Host, *, makes: bool = True) -> None:
        self._host = host
        self._makes = makes
        self._made: dict[IpAddress, Detour] = {}

    def put(self, ips: Iterable[IpAddress]) -> None:
        """Have the rules that these addresses need now; fine if they are there.

        Raises:
            RedirectError: the kernel refused something; the address has none of the rules then.
        """
        wanted = list(ips)
        if not wanted or not self._may_make():
            return
        with _opened(self._host) as sock:
            plans = self._plans(sock, wanted)
            for ip in wanted:
                if self._made.get(ip) != plans.get(ip):  # another pod's before
                    self._unmake(sock, [ip])
                if ip in plans:
                    _make(sock, plans[ip])
                    self._made[ip] = plans[ip]

    def drop(self, ips: Iterable[IpAddress]) -> None:
        """Remove the rules of these addresses, if they have any.

        Raises:
            RedirectError: the kernel refused to.
        """
        known = [ip for ip in ips if ip in self._made]
        if known:
            with _opened(self._host) as sock:
                self._unmake(sock, known)

    def settle(self, ips: Iterable[IpAddress]) -> list[str]:
        """Have the rules of these addresses and none else of ours, whoever of us made them.

        Returns what was left over, and is removed, for the log.

        Raises:
            RedirectError: the kernel refused something.
        """
        wanted = list(ips) if self._makes else []
        with _opened(self._host) as sock:
            found = {rule for version in _VERSIONS for rule in _our_rules(sock, version)}
            may_make = bool(wanted) and self._may_make()
            plans = self._plans(sock, wanted) if may_make or found else {}
            if not may_make:  # those of pods that live stay nevertheless
                plans = {ip: plan for ip, plan in plans.items() if found.issuperset(plan.rules)}
            surplus = found.difference(*(plan.rules for plan in plans.values()))
            for rule in surplus:
                _send(sock, _DELETE_RULE, rule, tolerated=errno.ENOENT)
            for plan in plans.values():
                if not found.issuperset(plan.rules):
                    _make(sock, plan)
            self._made = plans
        return sorted(map(str, surplus))

    def clear(self) -> None:
        """Remove all of ours.

        Raises:
            RedirectError: the kernel refused to.
        """
        self.settle([])

    def _may_make(self) -> bool:
        return self._makes and self._host.call(_early_demux_is_off)

    def _unmake(self, sock: NetlinkSocket, ips: Iterable[IpAddress]) -> None:
        for ip in ips:
            for rule in self._made[ip].rules if ip in self._made else ():
                _send(sock, _DELETE_RULE, rule, tolerated=errno.ENOENT)
            self._made.pop(ip, None)

    def _plans(self, sock: NetlinkSocket, ips: Iterable[IpAddress]) -> dict[IpAddress, Detour]:
        plans: dict[IpAddress, Detour] = {}
        for version in {ip.version for ip in ips}:
            wanted = {ip for ip in ips if ip.version == version}
            routes = self._routes(sock, version, wanted)
            rules = list(_rules(sock, version)) if routes else []
            for ip in wanted:
                if plan := plan_detour(ip, routes, rules):
                    plans[ip] = plan
        return plans

    def _routes(self, sock: NetlinkSocket, version: int, wanted: set[IpAddress]) -> list[HostRoute]:
        found = []
        for body in _dump(sock, _GET_ROUTE, version):
            attributes = dict(attributes_in(body[_HEAD_BYTES:]))
            if body[_HEAD_TYPE] != _UNICAST or not attributes.keys() >= _ROUTE_ATTRIBUTES:
                continue
            packed = attributes[_RTA_DST]
            table = _number(attributes[_RTA_TABLE])
            is_whole = body[_HEAD_DST_LEN] == 8 * len(packed)
            if is_whole and table not in _USUAL_TABLES and (ip := ip_address(packed)) in wanted:
                found.append(HostRoute(ip, table, self._name(_number(attributes[_RTA_OIF]))))
        return found

    def _name(self, index: int) -> str:
        try:
            return self._host.call(lambda: socket.if_indextoname(index))
        except OSError:  # it has just gone
            return ""


def _early_demux_is_off() -> bool:
    try:
        return _EARLY_DEMUX.read_text(encoding="ascii").strip() == "0"
    except OSError:
        return False


def _opened(host: Host) -> NetlinkSocket:
    try:
        return host.call(lambda: NetlinkSocket(NETLINK_ROUTE))
    except OSError as exc:
        raise RedirectError(f"cannot enter the host's namespace: {exc}") from exc


def _rules(sock: NetlinkSocket, version: int) -> Iterator[InputRule]:
    for body in _dump(sock, _GET_RULE, version):
        attributes = dict(attributes_in(body[_HEAD_BYTES:]))
        name = _interface(attributes)
        if name and body[_HEAD_TYPE] == _TO_TABLE and _FRA_PRIORITY in attributes:
            preference = _number(attributes[_FRA_PRIORITY])
            yield InputRule(name, _number(attributes[_FRA_TABLE]), preference)


def _our_rules(sock: NetlinkSocket, version: int) -> Iterator[OurRule]:
    for body in _dump(sock, _GET_RULE, version):
        if rule := _our_rule(body, version):
            yield rule


def _our_rule(body: bytes, version: int) -> OurRule | None:
    """Read a rule, if it is ours."""
    attributes = dict(attributes_in(body[_HEAD_BYTES:]))
    is_marked = attributes.get(_FRA_PROTOCOL) == bytes([PROTOCOL])
    if not is_marked or body[_HEAD_TYPE] != _TO_TABLE or not attributes.keys() <= _OUR_ATTRIBUTES:
        return None
    table = _number(attributes.get(_FRA_TABLE, bytes(4)))
    preference = _number(attributes.get(_FRA_PRIORITY, bytes(4)))
    name, packed = _interface(attributes), attributes.get(_FRA_DST, b"")
    if name and not packed and table == _TABLE_LOCAL:
        return OurRule(version, name, table, preference)
    is_whole = bool(packed) and body[_HEAD_DST_LEN] == 8 * len(packed)
    if is_whole and not name and preference == TO_POD_PREFERENCE:
        return OurRule(version, ip_address(packed), table, preference)
    return None


def _interface(attributes: dict[int, bytes]) -> str:
    return attributes.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode("ascii", "replace")


def _dump(sock: NetlinkSocket, kind: int, version: int) -> list[bytes]:
    message = fibmsg() if kind == _GET_RULE else rtmsg()
    message["family"] = family = _FAMILIES[version]
    try:
        bodies = sock.dump(encode(message, kind=kind, flags=NLM_F_DUMP, sequence=1))
    except OSError as exc:
        if exc.errno in _NO_SUCH_FAMILY:
            return []
        raise RedirectError(f"cannot read the host's routes: {exc}") from exc
    # For a family that it lacks, a kernel may show those that it has.
    return [body for body in bodies if body[_HEAD_FAMILY] == family]


def _number(value: bytes) -> int:
    return int(struct.unpack("=I", value)[0])


def _make(sock: NetlinkSocket, detour: Detour) -> None:
    to_pod, from_pod = detour.rules
    _send(sock, _NEW_RULE, to_pod, tolerated=errno.EEXIST)
    try:
        _send(sock, _NEW_RULE, from_pod, tolerated=errno.EEXIST)
    except RedirectError:
        _send(sock, _DELETE_RULE, to_pod, tolerated=errno.ENOENT)
        raise


def _message(rule: OurRule) -> fibmsg:
    message = fibmsg()
    message["family"] = _FAMILIES[rule.version]
    message["action"] = _TO_TABLE
    if isinstance(rule.selector, str):
        selector = ("FRA_IIFNAME", rule.selector)
    else:
        message["dst_len"] = rule.selector.max_prefixlen
        selector = ("FRA_DST", str(rule.selector))
    message["attrs"] = [
        ("FRA_TABLE", rule.table),
        ("FRA_PRIORITY", rule.preference),
        ("FRA_PROTOCOL", PROTOCOL),
        selector,
    ]
    return message


def _send(sock: NetlinkSocket, kind: int, rule: OurRule, *, tolerated: int) -> None:
    flags = NLM_F_ACK | (NLM_F_CREATE | NLM_F_EXCL if kind == _NEW_RULE else 0)
    message = encode(_message(rule), kind=kind, flags=flags, sequence=1)
    for failure in sock.exchange(message, acks=1):
        if failure.number != tolerated:
            raise RedirectError(
                f"cannot change the host's rules for a pod ({rule}): {failure.text}"
            )
