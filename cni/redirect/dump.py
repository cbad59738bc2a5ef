"""What packet filter the kernel holds, in a form that can be compared (linux/nf_tables.h).

How it works: the same reader takes the kernel's answers and our own messages. Of a rule it keeps
the expressions, each as its name and its attributes; counters lose their values. The kernel
answers with attributes that nobody sent, in its own order: so an expression is as wanted if it
has all wanted attributes with the wanted values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pyroute2.netlink.nfnetlink import nfgen_msg, nftsocket

from cni.redirect.errors import RedirectError
from cni.redirect.nft import Batch
from ztunnel.linux.netlink import NLM_F_DUMP, NetlinkSocket, attributes_in, encode, messages_in

FAMILY_INET = 1
_SUBSYSTEM = 10
_KIND_BITS = 0xFF
_TYPE_BITS = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_HEAD_BYTES = 4  # struct nfgenmsg

_TABLE_NAME, _TABLE_USERDATA = 1, 6
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_EXPR_NAME, _EXPR_DATA = 1, 2
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_COMMENT = 0  # NFTNL_UDATA_TABLE_COMMENT
# Attributes that hold attributes: data values, and in them verdicts.
_NESTED = {("cmp", 3), ("bitwise", 4), ("bitwise", 5), ("immediate", 2)}
_VERDICT = 2  # NFTA_DATA_VERDICT

Path = tuple[int, ...]
ChainKey = tuple[str, str]  # table, chain
BaseFacts = tuple[int, int, str] | None  # hook, priority, type; None for a regular chain


@dataclass(frozen=True, slots=True)
class Expression:
    """One step of a rule; attributes by their path of numbers."""

    name: str
    attributes: Mapping[Path, bytes]

    def covers(self, wanted: Expression) -> bool:
        """Whether this is `wanted`, apart from what the kernel adds."""
        mine = self.attributes
        return self.name == wanted.name and all(
            mine.get(path) == value for path, value in wanted.attributes.items()
        )


@dataclass(frozen=True, slots=True)
class FoundRule:
    """A rule as the kernel has it."""

    handle: bytes
    expressions: tuple[Expression, ...]

    def jump_target(self) -> str | None:
        """Give the chain it jumps to; None if it does not jump."""
        for expression in self.expressions:
            if expression.name == "immediate":
                name = expression.attributes.get((2, _VERDICT, 2))
                if name is not None:
                    return _text(name)
        return None


@dataclass(slots=True)
class Ruleset:
    """Tables with their comments, chains, and rules in order, of one family."""

    tables: dict[str, str] = field(default_factory=dict)
    chains: dict[ChainKey, BaseFacts] = field(default_factory=dict)
    rules: dict[ChainKey, list[FoundRule]] = field(default_factory=dict)


def read_ruleset(sock: NetlinkSocket, *, family: int = FAMILY_INET) -> Ruleset:
    """Read a family's packet filter from the namespace of `sock`.

    Raises:
        RedirectError: the kernel refused it.
    """
    found = Ruleset()
    try:
        for body in _dump(sock, nftsocket.NFT_MSG_GETTABLE, family):
            _take_table(found, body)
        for body in _dump(sock, nftsocket.NFT_MSG_GETCHAIN, family):
            _take_chain(found, body)
        for body in _dump(sock, nftsocket.NFT_MSG_GETRULE, family):
            _take_rule(found, body)
    except OSError as exc:
        raise RedirectError(f"cannot read redirection rules: {exc}") from exc
    return found


def ruleset_of(batch: Batch) -> Ruleset:
    """Read what a transaction of ours would leave in an empty namespace."""
    wanted = Ruleset()
    for kind, _, _, body in messages_in(batch.data):
        match kind & _KIND_BITS if kind >> 8 == _SUBSYSTEM else None:
            case nftsocket.NFT_MSG_NEWTABLE:
                _take_table(wanted, body)
            case nftsocket.NFT_MSG_DELTABLE:
                wanted.tables.pop(_text(_attributes(body)[_TABLE_NAME]), None)
            case nftsocket.NFT_MSG_NEWCHAIN:
                _take_chain(wanted, body)
            case nftsocket.NFT_MSG_NEWRULE:
                _take_rule(wanted, body)
            case _:
                pass
    return wanted


def differences(wanted: Ruleset, found: Ruleset, tables: Sequence[str]) -> list[str]:
    """Say in which of these tables `found` is not as wanted; nothing if all is well."""
    problems = [
        f"table {name} is {'missing' if name in wanted.tables else 'left over'}"
        for name in tables
        if (name in wanted.tables) != (name in found.tables)
    ]
    mine = {key: base for key, base in found.chains.items() if key[0] in wanted.tables}
    for key in sorted(mine.keys() | wanted.chains.keys()):
        if mine.get(key, ...) != wanted.chains.get(key, ...):
            problems.append(f"chain {' '.join(key)} is not as it should be")
        elif not _same_rules(wanted.rules.get(key, []), found.rules.get(key, [])):
            problems.append(f"rules of chain {' '.join(key)} are not as they should be")
    return problems


def _same_rules(wanted: Sequence[FoundRule], found: Sequence[FoundRule]) -> bool:
    return len(wanted) == len(found) and all(
        len(one.expressions) == len(other.expressions)
        and all(map(Expression.covers, other.expressions, one.expressions))
        for one, other in zip(wanted, found, strict=True)
    )


def _dump(sock: NetlinkSocket, kind: int, family: int) -> list[bytes]:
    message = nfgen_msg()
    message["nfgen_family"] = family
    data = encode(message, kind=_SUBSYSTEM << 8 | kind, flags=NLM_F_DUMP, sequence=1)
    return sock.dump(data)


def _take_table(into: Ruleset, body: bytes) -> None:
    attributes = _attributes(body)
    name = _text(attributes[_TABLE_NAME])
    comment = _comment(attributes.get(_TABLE_USERDATA, b""))
    into.tables[name] = comment or into.tables.get(name, "")


def _take_chain(into: Ruleset, body: bytes) -> None:
    attributes = _attributes(body)
    base: BaseFacts = None
    if _CHAIN_HOOK in attributes:
        hook = {kind & _TYPE_BITS: value for kind, value in attributes_in(attributes[_CHAIN_HOOK])}
        number = int(struct.unpack_from("!I", hook[_HOOK_NUMBER])[0])
        priority = int(struct.unpack_from("!i", hook[_HOOK_PRIORITY])[0])
        base = number, priority, _text(attributes[_CHAIN_TYPE])
    into.chains[_text(attributes[_CHAIN_TABLE]), _text(attributes[_CHAIN_NAME])] = base


def _take_rule(into: Ruleset, body: bytes) -> None:
    attributes = _attributes(body)
    key = _text(attributes[_RULE_TABLE]), _text(attributes[_RULE_CHAIN])
    elements = attributes_in(attributes.get(_RULE_EXPRESSIONS, b""))
    expressions = tuple(_expression(element) for _, element in elements)
    found = FoundRule(attributes.get(_RULE_HANDLE, b""), expressions)
    into.rules.setdefault(key, []).append(found)


def _expression(data: bytes) -> Expression:
    attributes = {kind & _TYPE_BITS: value for kind, value in attributes_in(data)}
    name = _text(attributes[_EXPR_NAME])
    if name == "counter":  # its values change with every packet
        return Expression(name, {})
    return Expression(name, dict(_paths(name, attributes.get(_EXPR_DATA, b""), ())))


def _paths(name: str, data: bytes, above: Path) -> Iterator[tuple[Path, bytes]]:
    for kind, value in attributes_in(data):
        path = (*above, kind & _TYPE_BITS)
        inside_data = len(path) == 1 and (name, path[0]) in _NESTED
        if inside_data or path[1:] == (_VERDICT,):
            yield from _paths(name, value, path)
        else:
            yield path, value


def _attributes(body: bytes) -> dict[int, bytes]:
    return {kind & _TYPE_BITS: value for kind, value in attributes_in(body[_HEAD_BYTES:])}


def _comment(userdata: bytes) -> str:
    """Read a comment among user data: entries of a type, a length and a value."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == _COMMENT:
            return _text(userdata[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")
