"""Which packets of a pod go to the proxy: the wanted rules (cni.md 4.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from cni.redirect.rules import (
    Accept,
    Base,
    Chain,
    ChainType,
    Condition,
    HasAddress,
    HasMark,
    HasPort,
    Hook,
    InNetwork,
    Ip,
    IpNetwork,
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
    Rule,
    SetZone,
    Table,
    check_interface_name,
)

# Numbers shared with the proxy and the reference (cni.md 4.1).
PROXY_MARK = 0x539  # on every packet the proxy sends inside a pod
CONNECTION_MARK = 0x111  # on connections the proxy makes with another's source address
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
TUNNEL_PORT = 15008
DNS_PROXY_PORT = 15053
DNS_PORT = 53
DNS_ZONE = 1  # keeps the proxy's own queries apart from the pod's in connection tracking
PROBE_SOURCES = (
    ip_address("169.254.7.127"),  # the kubelet's probes as the host's rules rewrite them
    ip_address("fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
)
IPV4 = 4
LOOPBACKS = (ip_address("127.0.0.1"), ip_address("::1"))
# Only IPv6: its sockets are bound to the link. 169.254.0.0/16 holds resolvers of whole clusters.
LINK_LOCAL = ip_network("fe80::/10")

NAT = "istio-ambient-nat"
MANGLE = "istio-ambient-mangle"
RAW = "istio-ambient-raw"
TABLE_NAMES = (NAT, MANGLE, RAW)

PREROUTING = "istio-prerouting"
OUTPUT = "istio-output"

EXCLUSIONS_MAX = 64  # of one kind: each costs every new connection of the pod a comparison

_IS_TCP = IsProtocol(Protocol.TCP)
_FROM_PROXY = HasMark(PROXY_MARK)
_NOT_FROM_PROXY = HasMark(PROXY_MARK, negate=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """TCP connections of one direction that are left alone. Ours: the reference has none.

    `ports`: destination ports. `networks`: of the other end.

    Raises:
        ValueError: there are more than `EXCLUSIONS_MAX` of a kind.
    """

    ports: tuple[int, ...] = ()
    networks: tuple[IpNetwork, ...] = ()

    def __post_init__(self) -> None:
        if max(len(self.ports), len(self.networks)) > EXCLUSIONS_MAX:
            raise ValueError(f"more than {EXCLUSIONS_MAX} exclusions")

    def rules(self, *, inbound: bool, ipv6: bool) -> Iterator[Rule]:
        """Make the rules to put before the capturing ones."""
        for port in self.ports:
            yield Rule((HasPort(Protocol.TCP, port),), Accept())
        for network in self.networks:
            if network.version == IPV4 or ipv6:
                yield Rule((_IS_TCP, InNetwork(network, source=inbound)), Accept())


@dataclass(frozen=True, slots=True, kw_only=True)
class RedirectPlan:
    """How one pod's traffic is redirected; equal plans mean equal rules.

    `dns`: send DNS queries to the proxy. `ipv6`: redirect IPv6 too. `ingress_mode`: leave
    plaintext that comes in alone. `virtual_interfaces`: what comes in by these is treated as
    going out (virtual machines inside the pod). `syn_only`: connections that exist when the pod
    is enrolled live on unprotected; the reference resets them (cni.md 10.2). `probe_sources`: who
    may come in and be answered directly, because it is the kubelet.

    Raises:
        ValueError: an interface name the kernel would not take.
    """

    dns: bool = False
    ipv6: bool = True
    ingress_mode: bool = False
    virtual_interfaces: tuple[str, ...] = ()
    syn_only: bool = False
    probe_sources: tuple[Ip, ...] = PROBE_SOURCES
    inbound_exclusion: Exclusion = Exclusion()
    outbound_exclusion: Exclusion = Exclusion()

    def __post_init__(self) -> None:
        for name in self.virtual_interfaces:
            check_interface_name(name)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The wanted tables in the order in which they are written."""
        nat = _table(
            NAT,
            prerouting=(Base(ChainType.NAT, Hook.PREROUTING, -100), self._nat_prerouting()),
            output=(Base(ChainType.NAT, Hook.OUTPUT, -100), self._nat_output()),
        )
        mangle = _table(
            MANGLE,
            prerouting=(
                Base(ChainType.FILTER, Hook.PREROUTING, -150),
                iter([Rule((_FROM_PROXY,), MarkConnection(CONNECTION_MARK))]),
            ),
            output=(
                Base(ChainType.ROUTE, Hook.OUTPUT, -150),
                iter([Rule((HasMark(CONNECTION_MARK, connection=True),), RestoreMark())]),
            ),
        )
        return (nat, mangle, _raw()) if self.dns else (nat, mangle)

    def __str__(self) -> str:
        return "".join(map(str, self.tables))

    def _nat_prerouting(self) -> Iterator[Rule]:
        for name in self.virtual_interfaces:
            yield Rule((OnInterface(name), _IS_TCP), Redirect(OUTBOUND_PORT))
            yield Rule((OnInterface(name), _IS_TCP), Return())
        if self.ingress_mode:
            return
        for ip in self._families(self.probe_sources):
            yield Rule((_IS_TCP, HasAddress(ip, source=True)), Accept())
        yield from self.inbound_exclusion.rules(inbound=True, ipv6=self.ipv6)
        plaintext = HasPort(Protocol.TCP, TUNNEL_PORT, negate=True)
        for loopback in self._families(LOOPBACKS):
            # Ours: only to the pod's own addresses. A neighbour on its link could send us anything,
            # and would have a hop on the way there.
            here = HasAddress(loopback, negate=True), plaintext, *self._first(), IsForUs()
            yield Rule((*here, _NOT_FROM_PROXY), Redirect(INBOUND_PORT))

    def _nat_output(self) -> Iterator[Rule]:
        for ip in self._families(self.probe_sources):
            yield Rule((_IS_TCP, HasAddress(ip)), Accept())
        if self.dns or self.ipv6:
            # Ours: the reference redirects these, too, but who calls an address of a link is bound
            # to the link, and from there no way leads to a proxy on ::1: it could call nobody. No
            # workload is known by such an address, so there is nothing that the proxy could add.
            yield Rule((InNetwork(LINK_LOCAL),), Accept())
        if self.dns:
            yield from self._dns_output()
        yield Rule((_IS_TCP, HasMark(CONNECTION_MARK)), Accept())
        for loopback in self._families(LOOPBACKS):
            # The application calls its own pod address.
            yield Rule(
                (OnInterface("lo", leaving=True), HasAddress(loopback, negate=True)), Accept()
            )
        yield from self.outbound_exclusion.rules(inbound=False, ipv6=self.ipv6)
        for loopback in self._families(LOOPBACKS):
            yield Rule(
                (_IS_TCP, HasAddress(loopback, negate=True), *self._first(), _NOT_FROM_PROXY),
                Redirect(OUTBOUND_PORT),
            )

    def _dns_output(self) -> Iterator[Rule]:
        outside = OnInterface("lo", leaving=True, negate=True)
        over_udp = HasPort(Protocol.UDP, DNS_PORT)
        # One rule for both families, also without `ipv6`, as the reference.
        yield Rule((outside, _NOT_FROM_PROXY, over_udp), Redirect(DNS_PROXY_PORT))
        for loopback in self._families(LOOPBACKS):
            over_tcp = HasPort(Protocol.TCP, DNS_PORT)
            yield Rule(
                (HasAddress(loopback, negate=True), over_tcp, _NOT_FROM_PROXY),
                Redirect(DNS_PROXY_PORT),
            )

    def _first(self) -> tuple[Condition, ...]:
        return (IsFirstSegment(),) if self.syn_only else ()

    def _families(self, both: tuple[Ip, ...]) -> tuple[Ip, ...]:
        return tuple(ip for ip in both if self.ipv6 or ip.version == IPV4)


def _raw() -> Table:
    query = Rule((HasPort(Protocol.UDP, DNS_PORT), _FROM_PROXY), SetZone(DNS_ZONE))
    answer = Rule(
        (HasPort(Protocol.UDP, DNS_PORT, source=True), _NOT_FROM_PROXY), SetZone(DNS_ZONE)
    )
    return _table(
        RAW,
        prerouting=(Base(ChainType.FILTER, Hook.PREROUTING, -300), iter([answer])),
        output=(Base(ChainType.FILTER, Hook.OUTPUT, -300), iter([query])),
    )


def _table(
    name: str, *, prerouting: tuple[Base, Iterator[Rule]], output: tuple[Base, Iterator[Rule]]
) -> Table:
    """Make a table in the one shape they all have: base chains that only jump."""
    chains = (
        Chain(PREROUTING, tuple(prerouting[1])),
        Chain(OUTPUT, tuple(output[1])),
        Chain(Hook.PREROUTING, (Rule((), Jump(PREROUTING)),), prerouting[0]),
        Chain(Hook.OUTPUT, (Rule((), Jump(OUTPUT)),), output[0]),
    )
    return Table(name, chains)
