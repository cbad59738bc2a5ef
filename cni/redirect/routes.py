"""Policy routing for source spoofing: marked answers come back to the proxy (cni.md 4.1).

The proxy speaks to the application with the client's address. The application's answers carry the
connection's mark; these routes deliver them here instead of sending them out of the pod.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.redirect.errors import RedirectError, RedirectPrivilegeError
from cni.redirect.plan import CONNECTION_MARK
from cni.redirect.rules import MARK_MASK
from ztunnel.linux.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    attributes_in,
    encode,
)

NETLINK_ROUTE = 0
ROUTE_TABLE = 100
RULE_PREFERENCE = 32764

_NEW_ROUTE, _DELETE_ROUTE = 24, 25  # RTM_*, linux/rtnetlink.h
_NEW_RULE, _DELETE_RULE = 32, 33
_GET_ROUTE, _GET_RULE = 26, 34
_HEAD_BYTES = 12  # struct rtmsg and struct fib_rule_hdr
_HEAD_TYPE = 7  # where rtmsg has the type, and the rule's header its action
_RTA_OIF, _RTA_TABLE = 4, 15
_FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 10, 15, 16
_TYPE_LOCAL = 2  # RTN_LOCAL
_SCOPE_HOST = 254
_SCOPE_NOWHERE = 255  # in a deletion: any scope
_PROTOCOL_BOOT = 3  # what `ip route` uses
_TO_TABLE = 1  # FR_ACT_TO_TBL
_LOOPBACK_INDEX = 1  # the kernel makes `lo` first in every namespace
_LOOPBACK_IPV6_SWITCH = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")

_FAMILY_NAMES: dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
# A namespace, a kernel or an interface without the family: there is nothing to remove.
_NOT_THERE = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT, errno.ENODEV, errno.EOPNOTSUPP}
)
# A kernel without IPv6 has nothing to redirect there; without IPv4 something is very wrong.
_NO_FAMILY: dict[int, frozenset[int]] = {
    socket.AF_INET: frozenset(),
    socket.AF_INET6: frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP}),
}


@dataclass(frozen=True, slots=True)
class _Step:
    label: str
    data: bytes
    tolerated: frozenset[int] = frozenset()


def loopback_has_ipv6() -> bool:
    """Whether `lo` of the calling thread's namespace may have IPv6; unknown counts as yes."""
    try:
        return _LOOPBACK_IPV6_SWITCH.read_text().strip() != "1"
    except OSError:
        return True


def add_routes(sock: NetlinkSocket, *, ipv6: bool, ipv6_on_loopback: bool) -> None:
    """Make sure of the routes and, after them, the rules that lead to them; each on its own.

    Raises:
        RedirectPrivilegeError: we lack CAP_NET_ADMIN.
        RedirectError: the kernel refused one.
    """
    for step in _additions(ipv6, ipv6_on_loopback):
        _take(sock, step)


def remove_routes(sock: NetlinkSocket) -> None:
    """Remove rules and routes of both families, whether or not they are there.

    Raises:
        RedirectPrivilegeError: we lack CAP_NET_ADMIN.
        RedirectError: the kernel refused to.
    """
    for step in _removals():
        _take(sock, step)


def missing_routes(sock: NetlinkSocket, *, ipv6: bool, ipv6_on_loopback: bool) -> list[str]:
    """Say which of the routes and rules that `add_routes` makes are not there.

    Raises:
        RedirectError: the kernel refused to tell.
    """
    families = (socket.AF_INET, socket.AF_INET6) if ipv6 else (socket.AF_INET,)
    problems = []
    try:
        for family in families:
            routed = family == socket.AF_INET or ipv6_on_loopback
            if routed and not any(map(_is_our_route, _dump(sock, _GET_ROUTE, family))):
                problems.append(f"{_FAMILY_NAMES[family]} local route is missing")
            if not any(map(_is_our_rule, _dump(sock, _GET_RULE, family))):
                problems.append(f"{_FAMILY_NAMES[family]} rule for marked packets is missing")
    except OSError as exc:
        raise RedirectError(f"cannot read routes: {exc}") from exc
    return problems


def _dump(sock: NetlinkSocket, kind: int, family: int) -> list[bytes]:
    message = fibmsg() if kind == _GET_RULE else rtmsg()
    message["family"] = family
    try:
        return sock.dump(encode(message, kind=kind, flags=NLM_F_DUMP, sequence=1))
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return []
        raise


def _is_our_route(body: bytes) -> bool:
    attributes = dict(attributes_in(body[_HEAD_BYTES:]))
    return body[_HEAD_TYPE] == _TYPE_LOCAL and (
        _number(attributes, _RTA_TABLE) == ROUTE_TABLE
        and _number(attributes, _RTA_OIF) == _LOOPBACK_INDEX
    )


def _is_our_rule(body: bytes) -> bool:
    attributes = dict(attributes_in(body[_HEAD_BYTES:]))
    return body[_HEAD_TYPE] == _TO_TABLE and (
        _number(attributes, _FRA_TABLE) == ROUTE_TABLE
        and _number(attributes, _FRA_FWMARK) == CONNECTION_MARK
        and _number(attributes, _FRA_FWMASK) == MARK_MASK
    )


def _number(attributes: dict[int, bytes], kind: int) -> int:
    return int(struct.unpack("=I", attributes.get(kind, bytes(4)))[0])


def _take(sock: NetlinkSocket, step: _Step) -> None:
    try:
        failures = sock.exchange(step.data, acks=1)
    except OSError as exc:
        raise RedirectError(f"cannot {step.label}: {exc}") from exc
    for failure in failures:
        if failure.number in step.tolerated:
            continue
        text = f"cannot {step.label}: {failure.text}"
        match failure.number:
            case errno.EPERM | errno.EACCES:
                raise RedirectPrivilegeError(f"{text}; is the capability CAP_NET_ADMIN missing?")
            case errno.ENETDOWN:
                raise RedirectError(f"{text}; is the pod's lo interface down?")
            case _:
                raise RedirectError(text)


@lru_cache(maxsize=4)
def _additions(ipv6: bool, ipv6_on_loopback: bool) -> tuple[_Step, ...]:  # noqa: FBT001 - a key
    steps = [_route(socket.AF_INET)]
    if ipv6 and ipv6_on_loopback:
        steps.append(_route(socket.AF_INET6))
    # The reference stops at the first rule that exists, and so never adds the IPv6 one later.
    steps.append(_rule(socket.AF_INET))
    if ipv6:
        steps.append(_rule(socket.AF_INET6))
    return tuple(steps)


@lru_cache(maxsize=1)
def _removals() -> tuple[_Step, ...]:
    both = (socket.AF_INET, socket.AF_INET6)
    makers: tuple[Callable[[int], _Step], ...] = (_no_rule, _no_route)
    return tuple(make(family) for make in makers for family in both)


def _route(family: int) -> _Step:
    data = encode(
        _route_message(family, _SCOPE_HOST),
        kind=_NEW_ROUTE,
        flags=NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        sequence=1,
    )
    label = f"add {_FAMILY_NAMES[family]} local route to table {ROUTE_TABLE}"
    return _Step(label, data, _NO_FAMILY[family])


def _no_route(family: int) -> _Step:
    data = encode(
        _route_message(family, _SCOPE_NOWHERE), kind=_DELETE_ROUTE, flags=NLM_F_ACK, sequence=1
    )
    label = f"remove {_FAMILY_NAMES[family]} local route from table {ROUTE_TABLE}"
    return _Step(label, data, _NOT_THERE)


def _rule(family: int) -> _Step:
    flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    data = encode(_rule_message(family), kind=_NEW_RULE, flags=flags, sequence=1)
    label = f"add {_FAMILY_NAMES[family]} rule for mark {CONNECTION_MARK:#x}"
    return _Step(label, data, _NO_FAMILY[family] | {errno.EEXIST})


def _no_rule(family: int) -> _Step:
    data = encode(_rule_message(family), kind=_DELETE_RULE, flags=NLM_F_ACK, sequence=1)
    label = f"remove {_FAMILY_NAMES[family]} rule for mark {CONNECTION_MARK:#x}"
    return _Step(label, data, _NOT_THERE)


def _route_message(family: int, scope: int) -> rtmsg:
    message = rtmsg()
    message["family"] = family
    message["table"] = ROUTE_TABLE
    message["type"] = _TYPE_LOCAL
    message["scope"] = scope
    message["proto"] = _PROTOCOL_BOOT
    message["attrs"] = [("RTA_TABLE", ROUTE_TABLE), ("RTA_OIF", _LOOPBACK_INDEX)]
    return message


def _rule_message(family: int) -> fibmsg:
    message = fibmsg()
    message["family"] = family
    message["table"] = ROUTE_TABLE
    message["action"] = _TO_TABLE
    message["attrs"] = [
        ("FRA_TABLE", ROUTE_TABLE),
        ("FRA_PRIORITY", RULE_PREFERENCE),
        ("FRA_FWMARK", CONNECTION_MARK),
        ("FRA_FWMASK", MARK_MASK),
    ]
    return message
