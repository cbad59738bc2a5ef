"""A plan as one atomic nftables transaction over netlink (cni.md 4.3, linux/nf_tables.h).

How it works: a batch is BEGIN, messages, END in one send. The kernel takes all of it or none, and
answers each message, so an error can name the rule. Rules are the same for most pods, so the
bytes of a plan are made once and sent again.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pyroute2.netlink.nfnetlink import nfgen_msg, nftsocket

from cni.redirect.errors import RedirectError, RedirectPrivilegeError
from cni.redirect.expressions import Attribute, expressions
from cni.redirect.plan import NAT, RAW, TABLE_NAMES, RedirectPlan
from cni.redirect.rules import Base, Chain, Hook, Rule, Table
from ztunnel.linux.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Failure,
    NetlinkSocket,
    encode,
)

NETLINK_NETFILTER = 12
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_FAMILY_INET = 1  # NFPROTO_INET: both families in one table

_CHAIN_POLICY_ACCEPT = 1
_HOOKS = {Hook.PREROUTING: 0, Hook.OUTPUT: 3, Hook.POSTROUTING: 4}


@dataclass(frozen=True, slots=True)
class Batch:
    """A transaction ready to send; `labels[n]` says what the message of sequence n + 1 does."""

    data: bytes
    labels: tuple[str, ...]


class _Builder:
    """Collects messages, numbered from `first` + 1 on."""

    def __init__(self, first: int = 0) -> None:
        self.parts = [_mark_of_batch(_BATCH_BEGIN)]
        self.labels: list[str] = []
        self._first = first

    def add(self, label: str, kind: int, attributes: list[Attribute], flags: int = 0) -> None:
        message = _MESSAGES[kind]()
        message["nfgen_family"] = _FAMILY_INET
        message["attrs"] = attributes
        self.labels.append(label)
        self.parts.append(
            encode(
                message,
                kind=_SUBSYSTEM << 8 | kind,
                flags=NLM_F_ACK | flags,
                sequence=self._first + len(self.labels),
            )
        )

    def finish(self) -> Batch:
        return Batch(b"".join([*self.parts, _mark_of_batch(_BATCH_END)]), tuple(self.labels))


_MESSAGES = {
    nftsocket.NFT_MSG_NEWTABLE: nftsocket.nft_table_msg,
    nftsocket.NFT_MSG_DELTABLE: nftsocket.nft_table_msg,
    nftsocket.NFT_MSG_NEWCHAIN: nftsocket.nft_chain_msg,
    nftsocket.NFT_MSG_NEWRULE: nftsocket.nft_rule_msg,
    nftsocket.NFT_MSG_DELRULE: nftsocket.nft_rule_msg,
    nftsocket.NFT_MSG_NEWSET: nftsocket.nft_set_msg,
}


@lru_cache(maxsize=64)
def replacement(plan: RedirectPlan) -> Batch:
    """Make the transaction that replaces whatever rules of ours there are by those of `plan`."""
    builder = _Builder()
    if not plan.dns:
        # The reference leaves these rules behind when DNS capture is switched off.
        _delete_table(builder, RAW)
    for table in plan.tables:
        _write_table(builder, table)
    return builder.finish()


def stamped(plan: RedirectPlan, stamp: str) -> Batch:
    """Make the same transaction, and leave `stamp` in the kernel as the first table's comment.

    The kernel keeps the comment a table was made with, so the table is made anew: still all or
    nothing, but its counters start again.
    """
    batch = replacement(plan)
    builder = _Builder(first=len(batch.labels))
    _delete_table(builder, NAT)
    _add_table(builder, NAT, stamp)
    head = _mark_of_batch(_BATCH_BEGIN)
    prefix = b"".join(builder.parts[1:])
    labels = (*batch.labels, *builder.labels)
    return Batch(head + prefix + batch.data[len(head) :], labels)


@lru_cache(maxsize=1)
def removal() -> Batch:
    """Make the transaction that removes all rules of ours, if there are any."""
    builder = _Builder()
    for name in TABLE_NAMES:
        _delete_table(builder, name)
    return builder.finish()


def commit(sock: NetlinkSocket, batch: Batch) -> None:
    """Apply a transaction in the namespace of `sock`, as a whole or not at all.

    It takes some 15 ms in the kernel, so call it from a thread.

    Raises:
        RedirectPrivilegeError: the kernel lacks nftables, or we lack CAP_NET_ADMIN.
        RedirectError: the kernel refused a message; the old rules still stand.
    """
    try:
        failures = sock.exchange(batch.data, acks=len(batch.labels))
    except OSError as exc:
        raise RedirectError(f"cannot write redirection rules: {exc}") from exc
    if failures:
        raise _error(failures, batch.labels)


def table_steps(
    table: Table, *, before_rules: Sequence[tuple[str, int, list[Attribute]]] = ()
) -> Batch:
    """Make the transaction that writes one table; `before_rules` are sets that its rules name.

    Sets that exist stay as they are, with their elements.
    """
    builder = _Builder()
    _write_table(builder, table, before_rules)
    return builder.finish()


def _error(failures: Sequence[Failure], labels: Sequence[str]) -> RedirectError:
    """Explain the first refusal; the sequence number 0 means the transaction as a whole."""
    failure = failures[0]
    known = 0 < failure.sequence <= len(labels)
    what = labels[failure.sequence - 1] if known else "begin transaction"
    text = f"cannot write redirection rules: {what}: {failure.text}"
    match failure.number:
        case errno.EPERM | errno.EACCES:
            return RedirectPrivilegeError(f"{text}; is the capability CAP_NET_ADMIN missing?")
        case errno.EOPNOTSUPP | errno.EPROTONOSUPPORT if not known:
            return RedirectPrivilegeError(f"{text}; does this kernel lack nftables (nf_tables)?")
        case errno.ENOENT | errno.EOPNOTSUPP:
            return RedirectPrivilegeError(
                f"{text}; does this kernel lack a module (nft_redir, nft_ct, nft_chain_nat)?"
            )
        case _:
            return RedirectError(text)


def _mark_of_batch(kind: int) -> bytes:
    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    return encode(message, kind=kind, flags=0, sequence=0)


def _delete_table(builder: _Builder, name: str) -> None:
    """Add, then delete: so it is no error if there is none."""
    _add_table(builder, name)
    attributes = [("NFTA_TABLE_NAME", name)]
    builder.add(f"delete table inet {name}", nftsocket.NFT_MSG_DELTABLE, attributes)


def _add_table(builder: _Builder, name: str, comment: str = "") -> None:
    attributes = [("NFTA_TABLE_NAME", name)]
    if comment:
        attributes.append(("NFTA_TABLE_USERDATA", comment))
    builder.add(f"add table inet {name}", nftsocket.NFT_MSG_NEWTABLE, attributes, NLM_F_CREATE)


def _write_table(
    builder: _Builder,
    table: Table,
    sets: Sequence[tuple[str, int, list[Attribute]]] = (),
) -> None:
    _add_table(builder, table.name)
    flush = [("NFTA_RULE_TABLE", table.name)]
    builder.add(f"flush table inet {table.name}", nftsocket.NFT_MSG_DELRULE, flush)
    for label, kind, attributes in sets:
        builder.add(label, kind, attributes, NLM_F_CREATE)
    for chain in table.chains:
        builder.add(
            f"add chain inet {table.name} {chain.name}",
            nftsocket.NFT_MSG_NEWCHAIN,
            _chain(table, chain),
            NLM_F_CREATE,
        )
    for chain in table.chains:
        for rule in chain.rules:
            builder.add(
                f"add rule inet {table.name} {chain.name} {rule}",
                nftsocket.NFT_MSG_NEWRULE,
                _rule(table, chain, rule),
                NLM_F_CREATE | NLM_F_APPEND,
            )


def _chain(table: Table, chain: Chain) -> list[Attribute]:
    attributes: list[Attribute] = [
        ("NFTA_CHAIN_TABLE", table.name),
        ("NFTA_CHAIN_NAME", chain.name),
    ]
    match chain.base:
        case Base(kind, hook, priority):
            where = [("NFTA_HOOK_HOOKNUM", _HOOKS[hook]), ("NFTA_HOOK_PRIORITY", priority)]
            attributes += [
                ("NFTA_CHAIN_HOOK", {"attrs": where}),
                ("NFTA_CHAIN_POLICY", _CHAIN_POLICY_ACCEPT),
                ("NFTA_CHAIN_TYPE", kind.value),
            ]
        case None:
            pass
    return attributes


def _rule(table: Table, chain: Chain, rule: Rule) -> list[Attribute]:
    return [
        ("NFTA_RULE_TABLE", table.name),
        ("NFTA_RULE_CHAIN", chain.name),
        ("NFTA_RULE_EXPRESSIONS", expressions(rule)),
    ]
