"""The reference's rules in their iptables form: find them, and take them away (cni.md 4.2, 4.4).

How it works: `iptables-nft` keeps its rules in nftables, in the tables `nat`, `mangle` and `raw` of
the families `ip` and `ip6`. The reference's are the chains whose name starts with `ISTIO_`, and
the jumps to them. Rules of others in the same tables stay. One batch per family takes them all,
or none. What the older `iptables-legacy` made is in another part of the kernel, see `legacy`. The
reference's nftables form has our names: replacing it needs nothing special.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pyroute2.netlink.nfnetlink import nftsocket

from cni.redirect.dump import Ruleset, read_ruleset
from cni.redirect.legacy import LegacyFilter
from cni.redirect.messages import batch, message, text
from cni.redirect.nft import Batch, commit
from ztunnel.linux.netlink import NetlinkSocket

CHAIN_PREFIX = "ISTIO_"
FAMILIES = {2: "IPv4", 10: "IPv6"}  # NFPROTO_*
TABLES = frozenset({"nat", "mangle", "raw"})

_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE = 1, 2, 3
_CHAIN_TABLE, _CHAIN_NAME = 1, 3


def find(sock: NetlinkSocket, old: Iterable[LegacyFilter] = ()) -> list[str]:
    """Say where the reference's iptables rules are, in the namespace of `sock`.

    Raises:
        RedirectError: the kernel refused to tell.
    """
    found = [
        f"{name} iptables chain {table} {chain} is left over"
        for family, name in FAMILIES.items()
        for table, chain in _chains(read_ruleset(sock, family=family))
    ]
    return [*found, *(problem for one in old for problem in one.find())]


def remove(sock: NetlinkSocket, old: Iterable[LegacyFilter] = ()) -> None:
    """Take them away; fine if there are none.

    Raises:
        RedirectError: the kernel refused to.
    """
    for family in FAMILIES:
        ruleset = read_ruleset(sock, family=family)
        if _chains(ruleset):
            commit(sock, _removal(ruleset, family))
    for one in old:
        one.remove()


def _chains(ruleset: Ruleset) -> list[tuple[str, str]]:
    return sorted(
        (table, chain)
        for table, chain in ruleset.chains
        if table in TABLES and chain.startswith(CHAIN_PREFIX)
    )


def _removal(ruleset: Ruleset, family: int) -> Batch:
    doomed = _chains(ruleset)
    steps: list[tuple[str, bytes]] = []
    for (table, chain), rules in ruleset.rules.items():
        for rule in rules:
            target = rule.jump_target()
            if (table, target) in doomed and (table, chain) not in doomed:
                where = [text(_RULE_TABLE, table), text(_RULE_CHAIN, chain)]
                handle = [struct.pack("=HH", 4 + len(rule.handle), _RULE_HANDLE) + rule.handle]
                data = message(nftsocket.NFT_MSG_DELRULE, family, [*where, *handle])
                steps.append((f"delete jump from {table} {chain} to {target}", data))
    for table, chain in doomed:
        where = [text(_RULE_TABLE, table), text(_RULE_CHAIN, chain)]
        data = message(nftsocket.NFT_MSG_DELRULE, family, where)
        steps.append((f"flush chain {table} {chain}", data))
    for table, chain in doomed:
        where = [text(_CHAIN_TABLE, table), text(_CHAIN_NAME, chain)]
        data = message(nftsocket.NFT_MSG_DELCHAIN, family, where)
        steps.append((f"delete chain {table} {chain}", data))
    return batch(steps)
