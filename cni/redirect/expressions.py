"""Conditions and actions as the kernel's expressions (linux/nf_tables.h).

How it works: a rule is a list of expressions that run left to right over registers. Loading ones
put a value into a register, comparing ones end the rule unless it is as wanted, and a verdict
goes into the verdict register.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, assert_never

from cni.redirect.rules import (
    MARK_MASK,
    NO_SOCKET_OWNER,
    Accept,
    Action,
    Condition,
    HasAddress,
    HasLocalSocket,
    HasMark,
    HasPort,
    InNetwork,
    InSet,
    IsFirstSegment,
    IsForUs,
    IsProtocol,
    Jump,
    MarkConnection,
    OnInterface,
    Protocol,
    Redirect,
    RestoreMark,
    Return,
    RewriteSource,
    Rule,
    SetZone,
)

# pyroute2 has no types; these are its trees of attributes.
Attribute = tuple[str, Any]
Expression = dict[str, list[Attribute]]

_REGISTER = 1  # NFT_REG_1; every rule of ours needs one at a time
_VERDICT_REGISTER = 0
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_NFPROTO, _META_L4PROTO = 3, 6, 7, 15, 16
_META_SKUID = 10
_CT_MARK, _CT_ZONE = 3, 17
_EQUAL, _NOT_EQUAL = 0, 1
_NAT_SOURCE = 0  # NFT_NAT_SNAT
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_VERDICT_ACCEPT, _VERDICT_JUMP, _VERDICT_RETURN = 1, -3, -5
_PROTOCOLS = {Protocol.TCP: 6, Protocol.UDP: 17}
# version: (NFPROTO_*, offset of the source address, of the destination address, length)
_FAMILIES = {4: (2, 12, 16, 4), 6: (10, 8, 24, 16)}
_INTERFACE_NAME_BYTES = 16
_FIB_DESTINATION = 2  # NFTA_FIB_F_DADDR
# NFT_FIB_RESULT_ADDRTYPE, which is 3; pyroute2 takes this number for a set of bits.
_FIB_ADDRESS_TYPE = frozenset({"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"})
_ROUTE_LOCAL = 2  # RTN_LOCAL
_TCP_FLAGS_OFFSET = 13
_TCP_SYN = 0x02
_TCP_OPENING_MASK = 0x17  # fin, syn, rst, ack


def expressions(rule: Rule) -> list[Expression]:
    """Turn a rule into what the kernel runs, as pyroute2 wants it."""
    parts = [part for condition in rule.conditions for part in _condition(condition)]
    if rule.is_counted:
        parts.append(_expression("counter", packets=0, bytes=0))
    return [*parts, *_action(rule.action)]


def _condition(condition: Condition) -> Iterator[Expression]:
    match condition:
        case IsProtocol(protocol):
            yield _meta(_META_L4PROTO)
            yield _compare(bytes([_PROTOCOLS[protocol]]))
        case HasPort(protocol, port, source, negate):
            yield from _condition(IsProtocol(protocol))
            yield _payload(_TRANSPORT_HEADER, 0 if source else 2, 2)
            yield _compare(struct.pack("!H", port), negate=negate)
        case HasAddress(ip, source, negate):
            yield from _address_of(ip.version, source=source)
            yield _compare(ip.packed, negate=negate)
        case InNetwork(network, source):
            yield from _address_of(network.version, source=source)
            yield _bitwise(network.netmask.packed)
            yield _compare(network.network_address.packed)
        case InSet(version, name):
            yield from _address_of(version, source=False)
            yield _expression("lookup", set=name, sreg=_REGISTER)
        case HasLocalSocket(uid):
            # Loading it ends the rule for packets that no process here has sent.
            yield _meta(_META_SKUID)
            owner = NO_SOCKET_OWNER if uid is None else uid
            yield _compare(_u32(owner), negate=uid is None)
        case _:
            yield from _packet_condition(condition)


def _packet_condition(
    condition: HasMark | OnInterface | IsFirstSegment | IsForUs,
) -> Iterator[Expression]:
    match condition:
        case HasMark(mark, connection, negate):
            yield _ct(_CT_MARK) if connection else _meta(_META_MARK)
            yield _bitwise(_u32(MARK_MASK))
            yield _compare(_u32(mark), negate=negate)
        case OnInterface(name, leaving, negate):
            yield _meta(_META_OIFNAME if leaving else _META_IIFNAME)
            padded = name.encode("ascii").ljust(_INTERFACE_NAME_BYTES, b"\0")
            yield _compare(padded, negate=negate)
        case IsForUs():
            yield _expression(
                "fib", dreg=_REGISTER, result=_FIB_ADDRESS_TYPE, flags=_FIB_DESTINATION
            )
            yield _compare(_u32(_ROUTE_LOCAL))
        case IsFirstSegment():
            yield _payload(_TRANSPORT_HEADER, _TCP_FLAGS_OFFSET, 1)
            yield _bitwise(bytes([_TCP_OPENING_MASK]))
            yield _compare(bytes([_TCP_SYN]))
        case _:
            assert_never(condition)


def _address_of(version: int, *, source: bool) -> Iterator[Expression]:
    """Match the family, then load an address."""
    family, source_offset, destination_offset, length = _FAMILIES[version]
    yield _meta(_META_NFPROTO)
    yield _compare(bytes([family]))
    yield _payload(_NETWORK_HEADER, source_offset if source else destination_offset, length)


def _action(action: Action) -> Iterator[Expression]:
    match action:
        case Accept():
            yield _verdict(_VERDICT_ACCEPT)
        case Return():
            yield _verdict(_VERDICT_RETURN)
        case Jump(chain):
            yield _verdict(_VERDICT_JUMP, chain)
        case Redirect(port):
            yield _immediate(struct.pack("!H", port))
            yield _expression(
                "redir", reg_proto_min=_REGISTER, flags={"NF_NAT_RANGE_PROTO_SPECIFIED"}
            )
        case RewriteSource(ip):
            yield _immediate(ip.packed)
            family = _FAMILIES[ip.version][0]
            yield _expression("nat", type=_NAT_SOURCE, family=family, reg_addr_min=_REGISTER)
        case MarkConnection(mark):
            # (mark & ~ours) | new, as the single expression (mark & keep) ^ new.
            yield _ct(_CT_MARK)
            yield _bitwise(_u32(0xFFFF_FFFF & ~MARK_MASK), _u32(mark))
            yield _expression("ct", key=_CT_MARK, sreg=_REGISTER)
        case RestoreMark():
            yield _ct(_CT_MARK)
            yield _expression("meta", key=_META_MARK, sreg=_REGISTER)
        case SetZone(zone):
            yield _immediate(struct.pack("=H", zone))
            yield _expression("ct", key=_CT_ZONE, sreg=_REGISTER)
        case _:
            assert_never(action)


def _expression(name: str, **fields: object) -> Expression:
    attributes = [(f"NFTA_{name.upper()}_{key.upper()}", value) for key, value in fields.items()]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": attributes})]}


def _value(data: bytes) -> Expression:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def _u32(number: int) -> bytes:
    return struct.pack("=I", number)


def _meta(key: int) -> Expression:
    return _expression("meta", key=key, dreg=_REGISTER)


def _ct(key: int) -> Expression:
    return _expression("ct", dreg=_REGISTER, key=key)


def _payload(base: int, offset: int, length: int) -> Expression:
    return _expression("payload", dreg=_REGISTER, base=base, offset=offset, len=length)


def _compare(data: bytes, *, negate: bool = False) -> Expression:
    operator = _NOT_EQUAL if negate else _EQUAL
    return _expression("cmp", sreg=_REGISTER, op=operator, data=_value(data))


def _bitwise(mask: bytes, flip: bytes | None = None) -> Expression:
    """Keep the bits of `mask`, then flip those of `flip` (None: none)."""
    return _expression(
        "bitwise",
        sreg=_REGISTER,
        dreg=_REGISTER,
        len=len(mask),
        mask=_value(mask),
        xor=_value(flip or bytes(len(mask))),
    )


def _immediate(data: bytes) -> Expression:
    return _expression("immediate", dreg=_REGISTER, data=_value(data))


def _verdict(code: int, chain: str | None = None) -> Expression:
    attributes: list[Attribute] = [("NFTA_VERDICT_CODE", code)]
    if chain is not None:
        attributes.append(("NFTA_VERDICT_CHAIN", chain))
    data = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": attributes})]}
    return _expression("immediate", dreg=_VERDICT_REGISTER, data=data)
