"""Redirect a pod, and stop redirecting it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from cni.redirect import foreign, nft, routes
from cni.redirect.dump import differences, read_ruleset, ruleset_of
from cni.redirect.errors import RedirectError
from cni.redirect.legacy import LegacyFilter, open_filters
from cni.redirect.plan import NAT, TABLE_NAMES, RedirectPlan
from ztunnel.linux.netlink import NetlinkSocket

T = TypeVar("T")

_MIGRATE_SWITCH = Path("/proc/sys/net/ipv4/tcp_migrate_req")


class Enterable(Protocol):
    """A namespace in which a plain function can be run."""

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` inside and return its result."""


@dataclass(frozen=True, slots=True)
class _Inside:
    """What was opened or read inside the pod, and serves from outside."""

    routing: NetlinkSocket
    filtering: NetlinkSocket
    old: tuple[LegacyFilter, ...]
    ipv6_on_loopback: bool

    def close(self) -> None:
        self.routing.close()
        self.filtering.close()
        for one in self.old:
            one.close()


def apply_redirect(netns: Enterable, plan: RedirectPlan, stamp: str = "") -> None:
    """Write routes, then rules, into a pod; again is fine, and replaces another plan.

    `stamp` is left in the pod, for `read_stamp`. What the reference wrote with iptables goes
    away after our rules stand. It blocks for some 20 ms, nearly all of it in the kernel: call it
    from a thread.

    Raises:
        RedirectError: the kernel refused something, or the namespace cannot be entered.
    """
    with closing(_open(netns)) as inside:
        # Routes first: with the rules alone, answers to the proxy would leave the pod for a while.
        routes.add_routes(inside.routing, ipv6=plan.ipv6, ipv6_on_loopback=inside.ipv6_on_loopback)
        batch = nft.stamped(plan, stamp) if stamp else nft.replacement(plan)
        nft.commit(inside.filtering, batch)
        foreign.remove(inside.filtering, inside.old)


def inspect_redirect(netns: Enterable, plan: RedirectPlan) -> list[str]:
    """Say in what a pod's rules and routes differ from the plan's; nothing if in nothing.

    Raises:
        RedirectError: they cannot be read.
    """
    with closing(_open(netns)) as inside:
        found = read_ruleset(inside.filtering)
        return [
            *differences(ruleset_of(nft.replacement(plan)), found, TABLE_NAMES),
            *routes.missing_routes(
                inside.routing, ipv6=plan.ipv6, ipv6_on_loopback=inside.ipv6_on_loopback
            ),
            *foreign.find(inside.filtering, inside.old),
        ]


def read_stamp(netns: Enterable) -> str | None:
    """Give the stamp of the rules in a pod; None if there are no rules, "" if without stamp.

    Raises:
        RedirectError: they cannot be read.
    """
    with closing(_open(netns)) as inside:
        tables = read_ruleset(inside.filtering).tables
        if NAT in tables:
            return tables[NAT]
        left = any(name in tables for name in TABLE_NAMES) or foreign.find(
            inside.filtering, inside.old
        )
        return "" if left else None


def remove_redirect(netns: Enterable) -> None:
    """Remove rules and routes from a pod; fine if there are none. Blocks: see `apply_redirect`.

    Raises:
        RedirectError: something is left, or the namespace cannot be entered.
    """
    with closing(_open(netns)) as inside:
        try:
            nft.commit(inside.filtering, nft.removal())
            foreign.remove(inside.filtering, inside.old)
        finally:
            routes.remove_routes(inside.routing)


def _open(netns: Enterable) -> _Inside:
    try:
        return netns.call(_open_inside)
    except OSError as exc:
        if exc.errno == errno.EPROTONOSUPPORT:
            reason = "the kernel has no netfilter netlink: does it lack nftables (nf_tables)?"
            raise RedirectError(reason) from exc
        raise RedirectError(f"cannot enter the pod's namespace: {exc}") from exc


def _open_inside() -> _Inside:
    # Connections that wait in the accept queue of a proxy that leaves move to its successor
    # instead of being reset. Linux 5.14; a read-only /proc/sys only costs us that.
    with contextlib.suppress(OSError):
        _MIGRATE_SWITCH.write_text("1")
    with contextlib.ExitStack() as stack:
        routing = stack.enter_context(NetlinkSocket(routes.NETLINK_ROUTE))
        filtering = stack.enter_context(NetlinkSocket(nft.NETLINK_NETFILTER))
        old = tuple(open_filters())
        stack.pop_all()  # all is well: it stays open
    return _Inside(routing, filtering, old, routes.loopback_has_ipv6())
