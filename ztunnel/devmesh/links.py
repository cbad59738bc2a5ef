"""Links, addresses and routes inside one namespace, through netlink (rtnetlink(7)).

Interface indexes are chosen by the caller, so that nothing has to be looked up: `lo` is always 1.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ztunnel.linux.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REPLACE,
    NetlinkSocket,
    attributes_in,
    encode,
)
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress, IpNetwork

NETLINK_ROUTE = 0
LOOPBACK_INDEX = 1

_NEW_LINK, _DELETE_LINK, _NEW_ADDRESS, _NEW_ROUTE, _DELETE_ROUTE = 16, 17, 20, 24, 25  # RTM_*
_GET_LINK = 18
_LINK_HEADER = struct.Struct("=4xi8x")  # struct ifinfomsg: index
_IFLA_OPERSTATE = 16
_OPERSTATE_UP = 6  # IF_OPER_UP: the kernel has seen the carrier and uses the interface
_IFF_UP = 1
_RUNNING_SECONDS = 2.0  # it takes a millisecond
_IFA_F_NODAD = 2  # usable at once: nobody else can have the address here
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_TABLE_MAIN = 254
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_PROTOCOL_BOOT = 3
_TYPE_UNICAST = 1
_RTNH_F_ONLINK = 4  # the gateway is on this link, whatever the addresses suggest


class Links:
    """Collects changes to one namespace, then makes them in one go, in order."""

    def __init__(self, netns: PodNetns) -> None:
        self._sock = netns.call(lambda: NetlinkSocket(NETLINK_ROUTE))
        self._messages: list[bytes] = []
        self._labels: list[str] = []

    def close(self) -> None:
        """Let go of the namespace."""
        self._sock.close()

    def bridge(self, index: int, name: str) -> None:
        """Make a bridge."""
        kind = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
        attributes = [("IFLA_IFNAME", name), ("IFLA_LINKINFO", kind)]
        self._add(f"bridge {name}", _NEW_LINK, _link(index, attributes), NLM_F_CREATE)

    def veth(
        self,
        index: int,
        name: str,
        *,
        peer: PodNetns,
        peer_index: int,
        peer_name: str,
        bridge: int | None = None,
    ) -> None:
        """Make a cable from an interface of ours, a port of `bridge`, to one in `peer`."""
        end = _link(peer_index, [("IFLA_IFNAME", peer_name), ("IFLA_NET_NS_FD", peer.fileno())])
        data = {"attrs": [("VETH_INFO_PEER", end)]}
        kind = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
        attributes: list[tuple[str, Any]] = [("IFLA_IFNAME", name), ("IFLA_LINKINFO", kind)]
        if bridge is not None:
            attributes.append(("IFLA_MASTER", bridge))
        self._add(f"veth {name}", _NEW_LINK, _link(index, attributes), NLM_F_CREATE)
        self.up(index)

    def up(self, index: int) -> None:
        """Switch an interface on."""
        message = _link(index, [])
        message["flags"] = message["change"] = _IFF_UP
        self._add(f"interface {index} up", _NEW_LINK, message, 0)

    def wait_running(self, index: int) -> None:
        """Wait until an interface passes packets; that comes after `up`, by itself.

        The kernel does it in a work queue at once; packets sent earlier would be lost, and TCP
        takes a second to send them again.

        Raises:
            TimeoutError: it does not; maybe the other end of the cable is not up.
        """
        deadline = time.monotonic() + _RUNNING_SECONDS
        while self._state(index) != _OPERSTATE_UP:
            if time.monotonic() > deadline:
                raise TimeoutError(f"interface {index} does not get ready")

    def _state(self, index: int) -> int | None:
        request = encode(_link(0, []), kind=_GET_LINK, flags=NLM_F_DUMP, sequence=1)
        for body in self._sock.dump(request):
            if _LINK_HEADER.unpack_from(body)[0] == index:
                attributes = dict(attributes_in(body[_LINK_HEADER.size :]))
                return attributes[_IFLA_OPERSTATE][0]
        return None

    def delete(self, index: int) -> None:
        """Remove an interface, and with it the other end of its cable."""
        self._add(f"delete interface {index}", _DELETE_LINK, _link(index, []), 0)

    def address(self, index: int, ip: IpAddress, prefix: int) -> None:
        """Give an interface an address that can be used at once."""
        message = ifaddrmsg()
        message["family"] = _FAMILIES[ip.version]
        message["index"] = index
        message["prefixlen"] = prefix
        flags = _IFA_F_NODAD if ip.version == 6 else 0  # noqa: PLR2004 - the family's name
        message["flags"] = flags
        message["attrs"] = [("IFA_LOCAL", str(ip)), ("IFA_ADDRESS", str(ip)), ("IFA_FLAGS", flags)]
        self._add(f"address {ip}", _NEW_ADDRESS, message, NLM_F_CREATE | NLM_F_REPLACE)

    def route(
        self,
        to: IpNetwork,
        index: int,
        *,
        via: IpAddress | None = None,
        source: IpAddress | None = None,
    ) -> None:
        """Send what goes to `to` out of an interface; `via` a neighbour there, None directly.

        `source`: the address of ours to use, None for the kernel's choice.
        """
        message = _route(to, index)
        message["scope"] = _SCOPE_UNIVERSE if via else _SCOPE_LINK
        if via:
            message["flags"] = _RTNH_F_ONLINK
            message["attrs"].append(("RTA_GATEWAY", str(via)))
        if source:
            message["attrs"].append(("RTA_PREFSRC", str(source)))
        self._add(f"route to {to}", _NEW_ROUTE, message, NLM_F_CREATE | NLM_F_REPLACE)

    def no_route(self, to: IpNetwork, index: int) -> None:
        """Take a route away."""
        message = _route(to, index)
        message["scope"] = 255  # RT_SCOPE_NOWHERE: any
        message["type"] = 0
        self._add(f"delete route to {to}", _DELETE_ROUTE, message, 0)

    def commit(self) -> None:
        """Make the changes collected so far.

        Raises:
            OSError: the kernel refused one; those before it were made.
        """
        if not self._messages:
            return
        data, labels = b"".join(self._messages), self._labels
        self._messages, self._labels = [], []
        for failure in self._sock.exchange(data, acks=len(labels)):
            raise OSError(failure.number, f"{labels[failure.sequence - 1]}: {failure.text}")

    def _add(self, label: str, kind: int, message: Any, flags: int) -> None:  # noqa: ANN401 - pyroute2 has no types
        self._labels.append(label)
        self._messages.append(
            encode(message, kind=kind, flags=NLM_F_ACK | flags, sequence=len(self._labels))
        )


def _link(index: int, attributes: list[tuple[str, Any]]) -> ifinfmsg:
    message = ifinfmsg()
    message["index"] = index
    message["attrs"] = attributes
    return message


def _route(to: IpNetwork, index: int) -> rtmsg:
    message = rtmsg()
    message["family"] = _FAMILIES[to.version]
    message["dst_len"] = to.prefixlen
    message["table"] = _TABLE_MAIN
    message["proto"] = _PROTOCOL_BOOT
    message["type"] = _TYPE_UNICAST
    message["attrs"] = [("RTA_OIF", index), ("RTA_TABLE", _TABLE_MAIN)]
    if to.prefixlen:
        message["attrs"].append(("RTA_DST", str(to.network_address)))
    return message
