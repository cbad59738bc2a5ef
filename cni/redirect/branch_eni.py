"""Rules on the host for pods that AWS gives a network interface of their own (cni.md 5.5).

The CNI of AWS leads the traffic of such a pod ("security groups for pods") through a table of its
own, in both directions, even to and from the host: so kubelet's probes, whose source we rewrite,
are not answered to where they came from. Two rules mend that: what is for the pod takes its table,
and what comes from the pod is first looked for among the host's own addresses. The reference's
sign for such a host is that early demultiplexing is off, which that CNI demands.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
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
_EARLY_DEMUX = Path("/proc/sys/net/ipv4/tcp_early_demux")
_TABLE_MAIN, _TABLE_LOCAL = 254, 255
_HOST_BITS = 32
_HEAD_BYTES = 12  # struct rtmsg and struct fib_rule_hdr
_HEAD_DST_LEN, _HEAD_TYPE = 1, 7  # the rule's header has its action where a route has its type
_UNICAST, _TO_TABLE = 1, 1  # RTN_UNICAST, FR_ACT_TO_TBL
_NEW_RULE, _DELETE_RULE, _GET_RULE, _GET_ROUTE = 32, 33, 34, 26  # RTM_*
_RTA_DST, _RTA_OIF, _RTA_TABLE = 1, 4, 15
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE = 3, 6, 15


class Host(Protocol):
    """The host's namespace."""

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` inside and return its result."""


@dataclass(frozen=True, slots=True)
class HostRoute:
    """Where the host sends what is for one address; `interface`: the host's end of a pod's link."""

    ip: IPv4Address
    table: int
    interface: str


@dataclass(frozen=True, slots=True)
class InputRule:
    """In which table the host looks up what comes in by an interface."""

    interface: str
    table: int
    preference: int


@dataclass(frozen=True, slots=True)
class Detour:
    """The two rules that one pod's address needs."""

    ip: IPv4Address
    table: int
    interface: str
    from_pod_preference: int


def plan_detour(
    ip: IPv4Address, routes: Iterable[HostRoute], rules: Iterable[InputRule]
) -> Detour | None:
    """Say which rules an address needs; None if it has no table of its own."""
    mine = {
        (route.interface, route.table)
        for route in routes
        if route.ip == ip and route.table not in (_TABLE_MAIN, _TABLE_LOCAL)
    }
    for rule in rules:
        if (rule.interface, rule.table) in mine and rule.preference > 0:
            return Detour(ip, rule.table, rule.interface, rule.preference - 1)
    return None


class Detours:
    """Makes and removes the rules of pods' addresses. It blocks: call it from a thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._made: dict[IpAddress, Detour] = {}

    def put(self, ips: Iterable[IpAddress]) -> None:
        """Make the rules that these addresses need; fine if they are there.

        Raises:
            RedirectError: the kernel refused something; the address has none of the rules then.
        """
        missing = [ip for ip in ips if isinstance(ip, IPv4Address) and ip not in self._made]
        if not missing or not self._host.call(_early_demux_is_off):
            return
        with _opened(self._host) as sock:
            routes, rules = self._routes(sock), list(_rules(sock))
            for ip in missing:
                detour = plan_detour(ip, routes, rules)
                if detour is not None:
                    _make(sock, detour)
                    self._made[ip] = detour

    def drop(self, ips: Iterable[IpAddress]) -> None:
        """Remove the rules of these addresses, if they have any.

        Raises:
            RedirectError: the kernel refused to.
        """
        known = [ip for ip in ips if ip in self._made]
        if not known:
            return
        with _opened(self._host) as sock:
            for ip in known:
                for kind, message in _messages(self._made[ip], _DELETE_RULE):
                    _send(sock, kind, message, tolerated=errno.ENOENT)
                del self._made[ip]

    def settle(self, ips: Iterable[IpAddress]) -> None:
        """Have the rules of these addresses, and no others of those we made.

        Raises:
            RedirectError: the kernel refused something.
        """
        wanted = set(ips)
        self.drop([ip for ip in self._made if ip not in wanted])
        self.put(wanted)

    def clear(self) -> None:
        """Remove all of them.

        Raises:
            RedirectError: the kernel refused to.
        """
        self.drop(list(self._made))

    def _routes(self, sock: NetlinkSocket) -> list[HostRoute]:
        found = []
        for body in _dump(sock, _GET_ROUTE):
            attributes = dict(attributes_in(body[_HEAD_BYTES:]))
            is_host_route = (body[_HEAD_DST_LEN], body[_HEAD_TYPE]) == (_HOST_BITS, _UNICAST)
            if is_host_route and {_RTA_DST, _RTA_OIF, _RTA_TABLE} <= attributes.keys():
                name = self._name(_number(attributes[_RTA_OIF]))
                ip = IPv4Address(attributes[_RTA_DST])
                found.append(HostRoute(ip, _number(attributes[_RTA_TABLE]), name))
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


def _rules(sock: NetlinkSocket) -> Iterator[InputRule]:
    for body in _dump(sock, _GET_RULE):
        attributes = dict(attributes_in(body[_HEAD_BYTES:]))
        name = attributes.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode("ascii", "replace")
        if name and body[_HEAD_TYPE] == _TO_TABLE and _FRA_PRIORITY in attributes:
            preference = _number(attributes[_FRA_PRIORITY])
            yield InputRule(name, _number(attributes[_FRA_TABLE]), preference)


def _dump(sock: NetlinkSocket, kind: int) -> list[bytes]:
    message = fibmsg() if kind == _GET_RULE else rtmsg()
    message["family"] = socket.AF_INET
    try:
        return sock.dump(encode(message, kind=kind, flags=NLM_F_DUMP, sequence=1))
    except OSError as exc:
        raise RedirectError(f"cannot read the host's routes: {exc}") from exc


def _number(value: bytes) -> int:
    return int(struct.unpack("=I", value)[0])


def _make(sock: NetlinkSocket, detour: Detour) -> None:
    (kind, to_pod), (_, from_pod) = _messages(detour, _NEW_RULE)
    _send(sock, kind, to_pod, tolerated=errno.EEXIST)
    try:
        _send(sock, kind, from_pod, tolerated=errno.EEXIST)
    except RedirectError:
        _send(sock, *next(_messages(detour, _DELETE_RULE)), tolerated=errno.ENOENT)
        raise


def _messages(detour: Detour, kind: int) -> Iterator[tuple[int, fibmsg]]:
    """Give the messages about both rules."""
    to_pod = _rule(detour.table, TO_POD_PREFERENCE)
    to_pod["dst_len"] = _HOST_BITS
    to_pod["attrs"].append(("FRA_DST", str(detour.ip)))
    yield kind, to_pod
    from_pod = _rule(_TABLE_LOCAL, detour.from_pod_preference)
    from_pod["attrs"].append(("FRA_IIFNAME", detour.interface))
    yield kind, from_pod


def _rule(table: int, preference: int) -> fibmsg:
    message = fibmsg()
    message["family"] = socket.AF_INET
    message["action"] = _TO_TABLE
    message["attrs"] = [("FRA_TABLE", table), ("FRA_PRIORITY", preference)]
    return message


def _send(sock: NetlinkSocket, kind: int, message: fibmsg, *, tolerated: int) -> None:
    flags = NLM_F_ACK | (NLM_F_CREATE | NLM_F_EXCL if kind == _NEW_RULE else 0)
    for failure in sock.exchange(encode(message, kind=kind, flags=flags, sequence=1), acks=1):
        if failure.number != tolerated:
            raise RedirectError(f"cannot change the host's rules for a pod: {failure.text}")
