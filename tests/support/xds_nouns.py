"""Any resource a control plane could send, for properties about the wire."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import strategies as st

from ztunnel.model.network import NetworkAddress, NetworkCidr
from ztunnel.model.policy import (
    Action,
    Match,
    MatchKind,
    Policy,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
from ztunnel.model.service import (
    BalanceMode,
    HealthPolicy,
    IpFamilies,
    LoadBalancer,
    Scope,
    Service,
    Visibility,
    WeightedWaypoint,
)
from ztunnel.model.workload import (
    ApplicationTunnel,
    AppProtocol,
    GatewayAddress,
    Health,
    Locality,
    NamespacedHostname,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

words = st.sampled_from(["shop", "bank", "a", "ü"])
maybe_words = st.sampled_from(["", "shop", "bank"])
ports = st.integers(0, 65535)
port_maps = st.dictionaries(ports, ports, max_size=3)
ips = st.sampled_from(["192.0.2.1", "10.1.2.3", "2001:db8::1"]).map(ip_address)
cidrs = st.sampled_from(["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32"]).map(ip_network)
keys = st.sampled_from(["shop/cart.svc", "bank/vault.svc", "a/b"])
network_addresses = st.builds(NetworkAddress, maybe_words, ips)
gateways = st.builds(
    GatewayAddress, network_addresses | st.builds(NamespacedHostname, words, words), ports
)

workloads = st.builds(
    Workload,
    uid=st.sampled_from(["lab//Pod/a/1", "lab//Pod/a/2", "x"]),
    name=maybe_words,
    namespace=maybe_words,
    trust_domain=words,
    service_account=words,
    ips=st.lists(ips, max_size=2).map(tuple),
    hostname=maybe_words,
    network=maybe_words,
    protocol=st.sampled_from(TunnelProtocol),
    network_mode=st.sampled_from(NetworkMode),
    native_tunnel=st.booleans(),
    application_tunnel=st.none()
    | st.builds(ApplicationTunnel, st.sampled_from(AppProtocol), st.none() | st.integers(1, 65535)),
    waypoint=st.none() | gateways,
    network_gateway=st.none() | gateways,
    workload_name=maybe_words,
    workload_type=st.sampled_from(["deployment", "cronjob", "pod", "job"]),
    canonical_name=maybe_words,
    canonical_revision=maybe_words,
    node=maybe_words,
    cluster_id=words,
    locality=st.builds(Locality, maybe_words, maybe_words, maybe_words),
    health=st.sampled_from(Health),
    capacity=st.integers(0, 2**32 - 1),
    policies=st.lists(keys, max_size=2).map(tuple),
    services=st.dictionaries(keys, port_maps, max_size=2),
)

services = st.builds(
    Service,
    name=maybe_words,
    namespace=maybe_words,
    hostname=words,
    vips=st.lists(network_addresses, max_size=2).map(tuple),
    cidr_vips=st.lists(st.builds(NetworkCidr, maybe_words, cidrs), max_size=2).map(tuple),
    ports=port_maps,
    subject_alt_names=st.lists(words, max_size=2).map(tuple),
    waypoint=st.none() | gateways,
    weighted_waypoints=st.lists(
        st.builds(WeightedWaypoint, gateways, st.integers(0, 100)), max_size=2
    ).map(tuple),
    load_balancer=st.none()
    | st.builds(
        LoadBalancer,
        st.lists(st.sampled_from(Scope), max_size=3).map(tuple),
        st.sampled_from(BalanceMode),
        st.sampled_from(HealthPolicy),
    ),
    ip_families=st.none() | st.sampled_from(IpFamilies),
    canonical=st.booleans(),
    visibility=st.sampled_from(Visibility),
)

string_matches = st.builds(
    StringMatch, st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX]), words
) | st.just(StringMatch(MatchKind.PRESENCE))
some_strings = st.lists(string_matches, max_size=2).map(tuple)
some_cidrs = st.lists(cidrs, max_size=2).map(tuple)
some_ports = st.lists(ports, max_size=2).map(tuple)
some_accounts = st.lists(st.builds(ServiceAccountMatch, words, words), max_size=2).map(tuple)
matches = st.builds(
    Match,
    namespaces=some_strings,
    not_namespaces=some_strings,
    principals=some_strings,
    not_principals=some_strings,
    service_accounts=some_accounts,
    not_service_accounts=some_accounts,
    source_ips=some_cidrs,
    not_source_ips=some_cidrs,
    destination_ips=some_cidrs,
    not_destination_ips=some_cidrs,
    destination_ports=some_ports,
    not_destination_ports=some_ports,
)
policies = st.builds(
    Policy,
    name=words,
    namespace=maybe_words,
    scope=st.sampled_from(PolicyScope),
    action=st.sampled_from(Action),
    rules=st.lists(
        st.lists(st.lists(matches, max_size=2).map(tuple), max_size=2).map(tuple), max_size=2
    ).map(tuple),
    dry_run=st.booleans(),
)
