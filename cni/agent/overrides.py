"""What a pod's annotations change in how it is redirected (cni.md 3.3). Pure.

The first three are the reference's. The `exclude-` ones are ours: numbers of ports, or networks,
with commas between them. An annotation that cannot be read counts as absent, with a warning: in
doubt, traffic is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_network
from typing import TypeVar

from cni.agent.objects import KubePod
from cni.redirect.plan import EXCLUSIONS_MAX, PROBE_SOURCES, Exclusion, RedirectPlan
from cni.redirect.rules import IpNetwork, check_interface_name
from ztunnel.model.network import IpAddress, parse_port

T = TypeVar("T")

BYPASS_INBOUND = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE = "ambient.istio.io/dns-capture"
VIRTUAL_INTERFACES = "istio.io/reroute-virtual-interfaces"
EXCLUDE_INBOUND_PORTS = "ambient.istio.io/exclude-inbound-ports"
EXCLUDE_OUTBOUND_PORTS = "ambient.istio.io/exclude-outbound-ports"
EXCLUDE_INBOUND_CIDRS = "ambient.istio.io/exclude-inbound-cidrs"
EXCLUDE_OUTBOUND_CIDRS = "ambient.istio.io/exclude-outbound-cidrs"

# What Go's strconv.ParseBool takes, and nothing else.
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


class ProbeStrategy(StrEnum):
    """How kubelet's probes get past the proxy.

    `snat`: the host rewrites their source (cni.md 5.3). `node-address`: the pod lets in what comes
    from its node's addresses; for CNIs whose eBPF programs bypass the host's packet filter. `none`.
    """

    SNAT = "snat"
    NODE_ADDRESS = "node-address"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirecting:
    """What the operator chose for all pods."""

    dns: bool = False
    ipv6: bool = True
    syn_only: bool = False
    probes: ProbeStrategy = ProbeStrategy.SNAT
    probe_sources: tuple[IpAddress, ...] = PROBE_SOURCES
    node_addresses: tuple[IpAddress, ...] = ()  # beside those Kubernetes knows

    def plan_for(self, pod: KubePod) -> tuple[RedirectPlan, list[str]]:
        """Make a pod's plan, and say which annotations could not be read."""
        reader = _Reader(pod.annotations)
        plan = RedirectPlan(
            dns=reader.get(DNS_CAPTURE, parse_bool, default=self.dns),
            ipv6=self.ipv6,
            syn_only=self.syn_only,
            ingress_mode=reader.get(BYPASS_INBOUND, parse_bool, default=False),
            virtual_interfaces=reader.get(VIRTUAL_INTERFACES, _interfaces, default=()),
            probe_sources=self._sources(pod),
            inbound_exclusion=Exclusion(
                ports=reader.get(EXCLUDE_INBOUND_PORTS, _ports, default=()),
                networks=reader.get(EXCLUDE_INBOUND_CIDRS, _networks, default=()),
            ),
            outbound_exclusion=Exclusion(
                ports=reader.get(EXCLUDE_OUTBOUND_PORTS, _ports, default=()),
                networks=reader.get(EXCLUDE_OUTBOUND_CIDRS, _networks, default=()),
            ),
        )
        return plan, reader.warnings

    def _sources(self, pod: KubePod) -> tuple[IpAddress, ...]:
        match self.probes:
            case ProbeStrategy.SNAT:
                return self.probe_sources
            case ProbeStrategy.NODE_ADDRESS:
                return tuple(dict.fromkeys((*pod.host_ips, *self.node_addresses)))
            case ProbeStrategy.NONE:
                return ()


def with_addresses(pod: KubePod, ips: tuple[IpAddress, ...]) -> KubePod:
    """Give the pod with the addresses the plugin reported, if Kubernetes does not know them yet."""
    return replace(pod, ips=ips) if ips and not pod.ips else pod


def parse_bool(text: str) -> bool:
    """Read a boolean as the reference does.

    Raises:
        ValueError: it is none.
    """
    if text not in _TRUE | _FALSE:
        raise ValueError(f"not a boolean: {text!r}")
    return text in _TRUE


class _Reader:
    def __init__(self, annotations: Mapping[str, str]) -> None:
        self._annotations = annotations
        self.warnings: list[str] = []

    def get(self, name: str, parse: Callable[[str], T], *, default: T) -> T:
        text = self._annotations.get(name)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as exc:
            self.warnings.append(f"{name}: {exc}")
            return default


def _words(text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if len(words) > EXCLUSIONS_MAX:
        raise ValueError(f"more than {EXCLUSIONS_MAX} entries")
    return words


def _interfaces(text: str) -> tuple[str, ...]:
    names = tuple(_words(text))
    for name in names:
        check_interface_name(name)
    return names


def _ports(text: str) -> tuple[int, ...]:
    ports = tuple(parse_port(word) for word in _words(text))
    if 0 in ports:
        raise ValueError("port 0")
    return ports


def _networks(text: str) -> tuple[IpNetwork, ...]:
    return tuple(ip_network(word) for word in _words(text))
