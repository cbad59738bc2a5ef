"""How kubelet's probes get past the mesh: address sets and one rule per family (cni.md 5).

How it works: what a process of the host itself sends to a pod in one of the two sets leaves with a
source address that the pod's own rules let in. The sets hold the addresses of the enrolled pods of
this node, each with its pod's uid as comment. Names are the reference's, so that either agent
takes over from the other. Unlike it we never empty the sets first: they are compared, and only
what is wrong changes, so probes work while an agent restarts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from pyroute2.netlink.nfnetlink import nfgen_msg, nftsocket

from cni.redirect.apply import Enterable
from cni.redirect.dump import differences, read_ruleset, ruleset_of
from cni.redirect.errors import RedirectError
from cni.redirect.messages import attribute, batch, message, nested, text
from cni.redirect.nft import NETLINK_NETFILTER, Batch, commit, table_steps
from cni.redirect.plan import NAT, PROBE_SOURCES
from cni.redirect.rules import (
    Base,
    Chain,
    ChainType,
    HasLocalSocket,
    Hook,
    InSet,
    Ip,
    IsProtocol,
    Protocol,
    RewriteSource,
    Rule,
    Table,
)
from ztunnel.linux.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NetlinkSocket,
    attributes_in,
    encode,
)

SET_PREFIX = "istio-inpod-probes"
SET_NAMES = {4: f"{SET_PREFIX}-v4", 6: f"{SET_PREFIX}-v6"}
_FAMILY_INET = 1
_KEY_TYPES = {4: (7, 4), 6: (8, 16)}  # nft's numbers of ipv4_addr and ipv6_addr; bytes
_SUBSYSTEM = 10
_TYPE_BITS = 0x3FFF
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_USERDATA, _DATA_VALUE = 1, 6, 1
_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT
_COMMENT_BYTES_MAX = 127
_HEAD_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """The probe rule; `owner` is the uid of the processes that may probe, None for any."""

    sources: tuple[Ip, ...] = PROBE_SOURCES
    owner: int | None = 0

    @property
    def table(self) -> Table:
        """The wanted table, without its sets."""
        rules = tuple(
            Rule(
                (
                    IsProtocol(Protocol.TCP),
                    HasLocalSocket(self.owner),
                    InSet(source.version, SET_NAMES[source.version]),
                ),
                RewriteSource(source),
            )
            for source in self.sources
        )
        chain = Chain(Hook.POSTROUTING, rules, Base(ChainType.NAT, Hook.POSTROUTING, 100))
        return Table(NAT, (chain,))


def apply_host(netns: Enterable, plan: HostPlan) -> None:
    """Write the sets, if they are missing, and the probe rule.

    Raises:
        RedirectError: the kernel refused it.
    """
    with _open(netns) as sock:
        commit(sock, _rule_batch(plan))


def inspect_host(netns: Enterable, plan: HostPlan) -> list[str]:
    """Say in what the host's rule differs from the plan; nothing if in nothing.

    Raises:
        RedirectError: it cannot be read.
    """
    with _open(netns) as sock:
        return differences(ruleset_of(_rule_batch(plan)), read_ruleset(sock), (NAT,))


def remove_host(netns: Enterable) -> None:
    """Remove rule and sets; fine if there are none.

    Raises:
        RedirectError: the kernel refused it.
    """
    with _open(netns) as sock:
        name = [text(1, NAT)]
        steps = [
            (f"add table inet {NAT}", message(0, _FAMILY_INET, name, NLM_F_CREATE)),
            (f"delete table inet {NAT}", message(nftsocket.NFT_MSG_DELTABLE, _FAMILY_INET, name)),
        ]
        commit(sock, batch(steps))


def read_members(netns: Enterable) -> dict[Ip, str]:
    """Read who is in the sets: pod uids by address.

    Raises:
        RedirectError: they cannot be read; likely there are none.
    """
    found: dict[Ip, str] = {}
    with _open(netns) as sock:
        for name in SET_NAMES.values():
            request = nfgen_msg()
            request["nfgen_family"] = _FAMILY_INET
            kind = _SUBSYSTEM << 8 | nftsocket.NFT_MSG_GETSETELEM
            data = encode(request, kind=kind, flags=NLM_F_DUMP, sequence=1)
            where = text(_LIST_TABLE, NAT) + text(_LIST_SET, name)
            # The length of a netlink message is its first field.
            size = struct.pack("=I", len(data) + len(where))
            try:
                bodies = sock.dump(size + data[4:] + where)
            except OSError as exc:
                raise RedirectError(f"cannot read set {name}: {exc}") from exc
            for body in bodies:
                found.update(_members(body))
    return found


def change_members(netns: Enterable, wanted: Mapping[Ip, str], unwanted: Iterable[Ip]) -> None:
    """Put addresses with their pods' uids into the sets and take others out, all or nothing.

    An address that is there with another uid gets the new one; one that is not there is fine.

    Raises:
        RedirectError: the kernel refused it.
    """
    steps: list[tuple[str, bytes]] = []
    for ip in unwanted:
        steps += [_element("add", ip), _element("delete", ip)]
    for ip, uid in wanted.items():
        # Adding what is there keeps the old comment (cni.md 10.3).
        steps += [_element("add", ip), _element("delete", ip), _element("add", ip, uid)]
    if steps:
        with _open(netns) as sock:
            commit(sock, batch(steps))


def _element(verb: str, ip: Ip, comment: str = "") -> tuple[str, bytes]:
    name = SET_NAMES[ip.version]
    parts = [nested(_ELEMENT_KEY, [attribute(_DATA_VALUE, ip.packed)])]
    if comment:
        value = comment.encode()[:_COMMENT_BYTES_MAX] + b"\0"
        parts.append(attribute(_ELEMENT_USERDATA, bytes([_COMMENT, len(value)]) + value))
    attributes = [
        text(_LIST_TABLE, NAT),
        text(_LIST_SET, name),
        nested(_LIST_ELEMENTS, [nested(1, parts)]),
    ]
    is_new = verb == "add"
    kind = nftsocket.NFT_MSG_NEWSETELEM if is_new else nftsocket.NFT_MSG_DELSETELEM
    data = message(kind, _FAMILY_INET, attributes, NLM_F_CREATE if is_new else 0)
    return f"{verb} {ip} in set {name}", data


def _members(body: bytes) -> dict[Ip, str]:
    found: dict[Ip, str] = {}
    attributes = _by_kind(body[_HEAD_BYTES:])
    for _, element in attributes_in(attributes.get(_LIST_ELEMENTS, b"")):
        parts = _by_kind(element)
        key = _by_kind(parts.get(_ELEMENT_KEY, b"")).get(_DATA_VALUE, b"")
        comment = parts.get(_ELEMENT_USERDATA, b"")
        uid = ""
        if comment[:1] == bytes([_COMMENT]):
            uid = comment[2 : 2 + comment[1]].rstrip(b"\0").decode("utf-8", "replace")
        found[ip_address(key)] = uid
    return found


def _by_kind(data: bytes) -> dict[int, bytes]:
    return {kind & _TYPE_BITS: value for kind, value in attributes_in(data)}


def _rule_batch(plan: HostPlan) -> Batch:
    return table_steps(plan.table, before_rules=[_set(version) for version in SET_NAMES])


def _set(version: int) -> tuple[str, int, list[tuple[str, object]]]:
    number, length = _KEY_TYPES[version]
    attributes: list[tuple[str, object]] = [
        ("NFTA_SET_TABLE", NAT),
        ("NFTA_SET_NAME", SET_NAMES[version]),
        ("NFTA_SET_KEY_TYPE", number),
        ("NFTA_SET_KEY_LEN", length),
        ("NFTA_SET_ID", version),
    ]
    return f"add set inet {NAT} {SET_NAMES[version]}", nftsocket.NFT_MSG_NEWSET, attributes


def _open(netns: Enterable) -> NetlinkSocket:
    try:
        return netns.call(lambda: NetlinkSocket(NETLINK_NETFILTER))
    except OSError as exc:
        raise RedirectError(f"cannot enter the host's namespace: {exc}") from exc
