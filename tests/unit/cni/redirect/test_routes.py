from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.redirect.errors import RedirectError, RedirectPrivilegeError
from cni.redirect.routes import add_routes, loopback_has_ipv6, missing_routes, remove_routes
from tests.support.namespaces import needs_root
from ztunnel.devmesh.cluster import Cluster, new_namespace
from ztunnel.linux.netlink import NLM_F_CREATE, Failure, NetlinkSocket, messages_in

NEW_ROUTE, DELETE_ROUTE, NEW_RULE, DELETE_RULE = 24, 25, 32, 33
V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)


class Kernel(NetlinkSocket):
    """Remembers what it was asked; refuses a family, None for all, with `number`, 0 for not."""

    def __init__(
        self, number: int = 0, *, family: int | None = None, error: OSError | None = None
    ) -> None:
        self.number = number
        self.family = family
        self.error = error
        self.asked: list[tuple[int, int]] = []  # kind, family
        self.data = b""

    def exchange(self, data: bytes, *, acks: int) -> list[Failure]:
        if self.error:
            raise self.error
        [(kind, _, sequence, body)] = messages_in(data)
        self.asked.append((kind, body[0]))
        self.data += data
        refuses = self.number and self.family in (None, body[0])
        return [Failure(sequence, self.number, "refused")] if refuses else []


@pytest.mark.parametrize(
    ("ipv6", "on_loopback", "wanted"),
    [
        (True, True, [(NEW_ROUTE, V4), (NEW_ROUTE, V6), (NEW_RULE, V4), (NEW_RULE, V6)]),
        (True, False, [(NEW_ROUTE, V4), (NEW_RULE, V4), (NEW_RULE, V6)]),
        (False, True, [(NEW_ROUTE, V4), (NEW_RULE, V4)]),
    ],
)
def test_routes_come_before_the_rules_that_lead_to_them(
    ipv6: bool,
    on_loopback: bool,
    wanted: list[tuple[int, int]],
) -> None:
    kernel = Kernel()
    add_routes(kernel, ipv6=ipv6, ipv6_on_loopback=on_loopback)
    assert kernel.asked == wanted


def test_rules_and_routes_are_those_of_the_reference() -> None:
    kernel = Kernel()
    add_routes(kernel, ipv6=False, ipv6_on_loopback=False)
    messages = list(messages_in(kernel.data))
    length = 16 + len(messages[0][3])
    route = rtmsg(kernel.data[:length])
    route.decode()
    rule = fibmsg(kernel.data[length:])
    rule.decode()
    assert (route["table"], route["type"], route["scope"], route["dst_len"]) == (100, 2, 254, 0)
    assert route.get_attr("RTA_OIF") == 1
    wanted = {
        "FRA_TABLE": 100,
        "FRA_PRIORITY": 32764,
        "FRA_FWMARK": 0x111,
        "FRA_FWMASK": 0xFFF,
    }
    assert {name: rule.get_attr(name) for name in wanted} == wanted
    assert all(flags & NLM_F_CREATE for _, flags, _, _ in messages)


def test_removal_asks_for_both_families() -> None:
    kernel = Kernel()
    remove_routes(kernel)
    assert kernel.asked == [
        (DELETE_RULE, V4),
        (DELETE_RULE, V6),
        (DELETE_ROUTE, V4),
        (DELETE_ROUTE, V6),
    ]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT])
def test_what_is_not_there_need_not_be_removed(number: int) -> None:
    kernel = Kernel(number)
    remove_routes(kernel)
    assert len(kernel.asked) == 4


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EOPNOTSUPP])
def test_a_kernel_without_ipv6_needs_no_ipv6_routes(number: int) -> None:
    add_routes(Kernel(number, family=V6), ipv6=True, ipv6_on_loopback=True)
    with pytest.raises(RedirectError, match="IPv4"):
        add_routes(Kernel(number, family=V4), ipv6=True, ipv6_on_loopback=True)


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.EPERM, RedirectPrivilegeError, "CAP_NET_ADMIN"),
        (errno.ENETDOWN, RedirectError, "lo interface down"),
        (errno.EEXIST, RedirectError, "add IPv4 local route to table 100: refused"),
    ],
)
def test_a_refusal_names_the_step(number: int, kind: type[RedirectError], hint: str) -> None:
    with pytest.raises(RedirectError, match=hint) as raised:
        add_routes(Kernel(number), ipv6=True, ipv6_on_loopback=True)
    assert type(raised.value) is kind


def test_a_broken_socket_is_reported() -> None:
    with pytest.raises(RedirectError, match="no buffer"):
        remove_routes(Kernel(error=OSError(errno.ENOBUFS, "no buffer")))


@pytest.mark.netns
@needs_root
def test_loopback_has_ipv6_unless_the_namespace_says_otherwise() -> None:
    switch = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    with new_namespace() as space:
        assert space.call(loopback_has_ipv6)
        space.call(lambda: switch.write_text("1"))
        assert not space.call(loopback_has_ipv6)


class Silent(NetlinkSocket):
    """Tells nothing, or fails."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def dump(self, data: bytes) -> list[bytes]:
        if self.error:
            raise self.error
        return []


def test_what_is_missing_is_named() -> None:
    assert missing_routes(Silent(), ipv6=True, ipv6_on_loopback=False) == [
        "IPv4 local route is missing",
        "IPv4 rule for marked packets is missing",
        "IPv6 rule for marked packets is missing",
    ]
    gone = Silent(OSError(errno.EAFNOSUPPORT, "no such family"))
    assert len(missing_routes(gone, ipv6=False, ipv6_on_loopback=True)) == 2


def test_a_kernel_that_does_not_tell_is_an_error() -> None:
    with pytest.raises(RedirectError, match="cannot read routes"):
        missing_routes(Silent(PermissionError(1, "no")), ipv6=True, ipv6_on_loopback=True)


@pytest.mark.netns
@needs_root
def test_what_was_added_is_found_and_what_was_removed_is_missed() -> None:
    with Cluster() as cluster:
        node = cluster.add_node("node")
        with node.netns.call(lambda: NetlinkSocket(0)) as sock:
            add_routes(sock, ipv6=True, ipv6_on_loopback=True)
            assert missing_routes(sock, ipv6=True, ipv6_on_loopback=True) == []
            remove_routes(sock)
            assert len(missing_routes(sock, ipv6=True, ipv6_on_loopback=True)) == 4
