"""Builders of nouns: a test names only what it is about, the rest is a plain default."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Any

from ztunnel.model.flow import Flow
from ztunnel.model.identity import Identity, Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Endpoint, Network, NetworkAddress, NetworkCidr, Port, parse_ip
from ztunnel.model.policy import (
    Action,
    Match,
    MatchKind,
    Policy,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)
from ztunnel.model.service import Service
from ztunnel.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    PolicyKey,
    ServiceKey,
    Workload,
    WorkloadUid,
)
from ztunnel.state.store import Store, Update


def an_identity(
    sa: str = "frontend", ns: str = "shop", trust_domain: str = "cluster.local"
) -> Identity:
    return Identity(TrustDomain(trust_domain), Namespace(ns), ServiceAccount(sa))


def ports(mapping: dict[int, int]) -> dict[Port, Port]:
    return {Port(port): Port(target) for port, target in mapping.items()}


def a_workload(
    name: str = "cart-0",
    *,
    ns: str = "shop",
    sa: str = "default",
    ips: Iterable[str] = ("192.0.2.10",),
    uid: str | None = None,
    network: str = "",
    services: dict[str, dict[int, int]] | None = None,
    policies: Iterable[str] = (),
    **more: Any,
) -> Workload:
    return Workload(
        uid=WorkloadUid(uid if uid is not None else f"lab//Pod/{ns}/{name}"),
        name=name,
        namespace=Namespace(ns),
        trust_domain=TrustDomain("cluster.local"),
        service_account=ServiceAccount(sa),
        ips=tuple(parse_ip(ip) for ip in ips),
        network=Network(network),
        services={ServiceKey(key): ports(mapping) for key, mapping in (services or {}).items()},
        policies=tuple(PolicyKey(key) for key in policies),
        **more,
    )


def a_vip(text: str) -> NetworkAddress:
    """Read `network/ip`; without a slash it is in the default network."""
    network, _, ip = text.rpartition("/")
    return NetworkAddress(Network(network), parse_ip(ip))


def a_cidr_vip(cidr: str, network: str = "") -> NetworkCidr:
    return NetworkCidr(Network(network), ip_network(cidr))


def a_service(
    hostname: str = "cart.shop.svc.cluster.local",
    *,
    ns: str = "shop",
    vips: Iterable[str] = (),
    cidrs: Iterable[str] = (),
    port_map: dict[int, int] | None = None,
    **more: Any,
) -> Service:
    return Service(
        name=hostname.partition(".")[0],
        namespace=Namespace(ns),
        hostname=hostname,
        vips=tuple(a_vip(vip) for vip in vips),
        cidr_vips=tuple(a_cidr_vip(cidr) for cidr in cidrs),
        ports=ports({80: 8080} if port_map is None else port_map),
        **more,
    )


def a_gateway(destination: str, port: int = 15008) -> GatewayAddress:
    """Refer to a gateway by `network/ip`, or by `namespace/hostname`."""
    try:
        return GatewayAddress(a_vip(destination), Port(port))
    except ValueError:
        namespace, _, hostname = destination.partition("/")
        return GatewayAddress(NamespacedHostname(Namespace(namespace), hostname), Port(port))


def exactly(text: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, text)


def an_account(text: str) -> ServiceAccountMatch:
    namespace, _, account = text.partition("/")
    return ServiceAccountMatch(Namespace(namespace), ServiceAccount(account))


def a_policy(
    name: str = "only-frontend",
    *,
    ns: str = "shop",
    action: Action = Action.ALLOW,
    scope: PolicyScope = PolicyScope.WORKLOAD_SELECTOR,
    rules: tuple[Rule, ...] | None = None,
    match: Match | None = None,
    dry_run: bool = False,
) -> Policy:
    """Make a policy; `match` is short for one rule of one clause of this one match."""
    if rules is None:
        rules = (((match,),),) if match is not None else ((),)
    return Policy(
        name=name,
        namespace=Namespace(ns),
        scope=scope,
        action=action,
        rules=rules,
        dry_run=dry_run,
    )


def allow(*accounts: str, name: str = "allow", **more: Any) -> Policy:
    """Make a policy that allows these `namespace/account`s."""
    match = Match(service_accounts=tuple(an_account(account) for account in accounts))
    return a_policy(name, action=Action.ALLOW, match=match, **more)


def deny(*accounts: str, name: str = "deny", **more: Any) -> Policy:
    """Make a policy that denies these `namespace/account`s."""
    match = Match(service_accounts=tuple(an_account(account) for account in accounts))
    return a_policy(name, action=Action.DENY, match=match, **more)


NOBODY = "nobody"


def a_flow(
    *,
    by: Identity | str = "",
    source: str = "192.0.2.1:40000",
    destination: str = "192.0.2.10:8080",
) -> Flow:
    """Make a flow; `by=NOBODY` is one without mutual TLS."""
    identity = by if isinstance(by, Identity) else an_identity()
    return Flow(
        source=None if by == NOBODY else identity,
        source_endpoint=Endpoint.parse(source),
        destination=Endpoint.parse(destination),
    )


def a_store(*things: Workload | Service | Policy, node: str = "") -> Store:
    store = Store(node=node)
    store.apply(
        Update(
            workloads=[thing for thing in things if isinstance(thing, Workload)],
            services=[thing for thing in things if isinstance(thing, Service)],
            policies=[thing for thing in things if isinstance(thing, Policy)],
        )
    )
    return store
