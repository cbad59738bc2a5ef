"""Packet filter rules as plain data, with as much of nftables as redirection needs.

Every noun prints as nft would write it, so that people can read a plan as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

INTERFACE_NAME_MAX = 15  # IFNAMSIZ without its terminator
MARK_MASK = 0xFFF  # the bits of a mark that are ours (cni.md 4.1); the rest belongs to others

NO_SOCKET_OWNER = 0xFFFF_FFFF  # what `skuid` can never be: (uid_t) -1

Ip = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network


class Protocol(StrEnum):
    """A transport we look at."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class IsProtocol:
    """Match a transport."""

    protocol: Protocol

    def __str__(self) -> str:
        return f"meta l4proto {self.protocol}"


@dataclass(frozen=True, slots=True)
class HasPort:
    """Match a transport and its destination (or source) port."""

    protocol: Protocol
    port: int
    source: bool = False
    negate: bool = False

    def __str__(self) -> str:
        side = "sport" if self.source else "dport"
        return f"{self.protocol} {side} {'!= ' if self.negate else ''}{self.port}"


@dataclass(frozen=True, slots=True)
class HasAddress:
    """Match a family and its destination (or source) address."""

    ip: Ip
    source: bool = False
    negate: bool = False

    def __str__(self) -> str:
        family = "ip6" if self.ip.version == 6 else "ip"  # noqa: PLR2004 - the family's name
        side = "saddr" if self.source else "daddr"
        return f"{family} {side} {'!= ' if self.negate else ''}{self.ip}"


@dataclass(frozen=True, slots=True)
class InNetwork:
    """Match a family and the network of its destination (or source) address."""

    network: IpNetwork
    source: bool = False

    def __str__(self) -> str:
        family = "ip6" if self.network.version == 6 else "ip"  # noqa: PLR2004 - the family's name
        return f"{family} {'saddr' if self.source else 'daddr'} {self.network}"


@dataclass(frozen=True, slots=True)
class InSet:
    """Match a family (4 or 6) and a destination address that is in a set of the same table."""

    version: int
    name: str

    def __str__(self) -> str:
        family = "ip6" if self.version == 6 else "ip"  # noqa: PLR2004 - the family's name
        return f"{family} daddr @{self.name}"


@dataclass(frozen=True, slots=True)
class IsForUs:
    """Match a destination that is an address of this very namespace."""

    def __str__(self) -> str:
        return "fib daddr type local"


@dataclass(frozen=True, slots=True)
class HasLocalSocket:
    """Match what a process of this very namespace sends; `uid` None: whoever runs it."""

    uid: int | None = None

    def __str__(self) -> str:
        return f"meta skuid != {NO_SOCKET_OWNER}" if self.uid is None else f"meta skuid {self.uid}"


@dataclass(frozen=True, slots=True)
class HasMark:
    """Match the packet's (or its connection's) mark under `MARK_MASK`."""

    mark: int
    connection: bool = False
    negate: bool = False

    def __str__(self) -> str:
        key = "ct mark" if self.connection else "meta mark"
        operator = "!=" if self.negate else "=="
        return f"{key} & {MARK_MASK:#010x} {operator} {self.mark:#010x}"


@dataclass(frozen=True, slots=True)
class OnInterface:
    """Match the name of the interface a packet came in by (or leaves by)."""

    name: str
    leaving: bool = False
    negate: bool = False

    def __str__(self) -> str:
        side = "oifname" if self.leaving else "iifname"
        return f'{side} {"!= " if self.negate else ""}"{self.name}"'


@dataclass(frozen=True, slots=True)
class IsFirstSegment:
    """Match the segment that opens a TCP connection, and no other."""

    def __str__(self) -> str:
        return "tcp flags & (fin | syn | rst | ack) == syn"


@dataclass(frozen=True, slots=True)
class Redirect:
    """Rewrite the destination to this port here; the original can be asked for."""

    port: int

    def __str__(self) -> str:
        return f"redirect to :{self.port}"


@dataclass(frozen=True, slots=True)
class Accept:
    """Leave the packet as it is."""

    def __str__(self) -> str:
        return "accept"


@dataclass(frozen=True, slots=True)
class Return:
    """Go back to the chain that jumped here."""

    def __str__(self) -> str:
        return "return"


@dataclass(frozen=True, slots=True)
class Jump:
    """Go on in another chain."""

    chain: str

    def __str__(self) -> str:
        return f"jump {self.chain}"


@dataclass(frozen=True, slots=True)
class MarkConnection:
    """Write a mark into the part of the connection's mark that is ours."""

    mark: int

    def __str__(self) -> str:
        others = 0xFFFF_FFFF & ~MARK_MASK
        return f"ct mark set ct mark & {others:#010x} | {self.mark:#010x}"


@dataclass(frozen=True, slots=True)
class RestoreMark:
    """Give the packet its connection's mark."""

    def __str__(self) -> str:
        return "meta mark set ct mark"


@dataclass(frozen=True, slots=True)
class SetZone:
    """Track the connection apart from those of other zones."""

    zone: int

    def __str__(self) -> str:
        return f"ct zone set {self.zone}"


@dataclass(frozen=True, slots=True)
class RewriteSource:
    """Give the connection another source address."""

    ip: Ip

    def __str__(self) -> str:
        family = "ip6" if self.ip.version == 6 else "ip"  # noqa: PLR2004 - the family's name
        return f"snat {family} to {self.ip}"


Condition = (
    IsProtocol
    | HasPort
    | HasAddress
    | InNetwork
    | InSet
    | IsForUs
    | HasLocalSocket
    | HasMark
    | OnInterface
    | IsFirstSegment
)
Action = Redirect | RewriteSource | Accept | Return | Jump | MarkConnection | RestoreMark | SetZone


@dataclass(frozen=True, slots=True)
class Rule:
    """If all conditions hold, count the packet (unless it jumps) and act."""

    conditions: tuple[Condition, ...]
    action: Action

    @property
    def is_counted(self) -> bool:
        """Whether the rule counts the packets it acted on."""
        return not isinstance(self.action, Jump)

    def __str__(self) -> str:
        counter = ["counter"] if self.is_counted else []
        return " ".join([*map(str, self.conditions), *counter, str(self.action)])


class ChainType(StrEnum):
    """What a base chain may do."""

    FILTER = "filter"
    NAT = "nat"
    ROUTE = "route"  # as filter, and a changed mark chooses the route again


class Hook(StrEnum):
    """Where in a packet's way a base chain is called."""

    PREROUTING = "prerouting"
    OUTPUT = "output"
    POSTROUTING = "postrouting"


@dataclass(frozen=True, slots=True)
class Base:
    """What makes a chain called by the kernel rather than by a jump."""

    type: ChainType
    hook: Hook
    priority: int

    def __str__(self) -> str:
        return f"type {self.type} hook {self.hook} priority {self.priority}; policy accept;"


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules in order; `base` is None for a chain that is only jumped to."""

    name: str
    rules: tuple[Rule, ...]
    base: Base | None = None

    def __str__(self) -> str:
        lines = [str(self.base)] if self.base else []
        body = "".join(f"\t\t{line}\n" for line in [*lines, *map(str, self.rules)])
        return f"\tchain {self.name} {{\n{body}\t}}\n"


@dataclass(frozen=True, slots=True)
class Table:
    """A named set of chains for both address families."""

    name: str
    chains: tuple[Chain, ...]

    def __str__(self) -> str:
        return f"table inet {self.name} {{\n{''.join(map(str, self.chains))}}}\n"


def check_interface_name(name: str) -> None:
    """Refuse what cannot be an interface's name.

    Raises:
        ValueError: it is empty, too long, or holds a slash, a blank, a quote or the like.
    """
    printable = name.isascii() and name.isprintable()
    forbidden = any(character in "/ \"'" for character in name)
    if not 0 < len(name) <= INTERFACE_NAME_MAX or not printable or forbidden:
        raise ValueError(f"not an interface name: {name!r}")
