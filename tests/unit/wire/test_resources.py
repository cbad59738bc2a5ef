from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.errors import ResourceError
from ztunnel.model.network import NetworkAddress, NetworkCidr
from ztunnel.model.service import BalanceMode, HealthPolicy, LoadBalancer, Scope, Visibility
from ztunnel.model.workload import Health, NetworkMode, TunnelProtocol, Workload
from ztunnel.wire.pb import workload_pb2 as pb
from ztunnel.wire.resources import key_of, read_address

UID = "lab//Pod/shop/cart-0"


def a_message(**fields: object) -> pb.Workload:
    return pb.Workload(uid=UID, **fields)


def read_workload(message: pb.Workload, notes: list[str] | None = None) -> Workload:
    data = pb.Address(workload=message).SerializeToString()
    found = read_address(data, [] if notes is None else notes)
    assert isinstance(found, Workload)
    return found


def read_service(message: pb.Service, notes: list[str] | None = None):
    data = pb.Address(service=message).SerializeToString()
    return read_address(data, [] if notes is None else notes)


def test_absent_fields_have_the_defaults_of_the_reference() -> None:
    found = read_workload(a_message())
    assert found.trust_domain == "cluster.local"
    assert found.service_account == "default"
    assert found.cluster_id == "Kubernetes"
    assert found.capacity == 1
    assert found.workload_type == "deployment"
    assert found.application_tunnel is None


def test_an_explicit_capacity_of_zero_stays_zero() -> None:
    message = a_message()
    message.capacity.value = 0
    assert read_workload(message).capacity == 0


def test_bytes_as_the_tables_say() -> None:
    # Address{1: Workload{20: "u", 3: 192.0.2.1, 5: 1, 22: {"s/h": {1: {1: 80, 2: 8080}}}}}
    service = b"\x0a\x03s/h\x12\x07\x0a\x05\x08\x50\x10\x90\x3f"
    workload = (
        b"\xa2\x01\x01u" + b"\x1a\x04\xc0\x00\x02\x01" + b"\x28\x01" + b"\xb2\x01\x0e" + service
    )
    found = read_address(b"\x0a" + bytes([len(workload)]) + workload, [])
    assert isinstance(found, Workload)
    assert (found.uid, found.ips) == ("u", (ip_address("192.0.2.1"),))
    assert found.protocol is TunnelProtocol.HBONE
    assert found.services == {"s/h": {80: 8080}}


@pytest.mark.parametrize(
    ("fields", "attribute", "wanted", "note"),
    [
        ({"tunnel_protocol": 2}, "protocol", TunnelProtocol.NONE, "tunnel_protocol: 2"),
        ({"tunnel_protocol": 99}, "protocol", TunnelProtocol.NONE, "tunnel_protocol: 99"),
        ({"network_mode": 9}, "network_mode", NetworkMode.STANDARD, "network_mode: 9"),
        ({"status": 9}, "health", Health.UNHEALTHY, "status: 9"),
        (
            {"application_tunnel": pb.ApplicationTunnel(protocol=7)},
            "application_tunnel",
            None,
            "application_tunnel.protocol: 7",
        ),
    ],
)
def test_an_unknown_value_of_a_workload_is_taken_safely_and_noted(
    fields: dict[str, object], attribute: str, wanted: object, note: str
) -> None:
    notes: list[str] = []
    assert getattr(read_workload(a_message(**fields), notes), attribute) is wanted
    assert [text.startswith(note) for text in notes] == [True]


def test_unknown_preferences_of_a_service_are_ignored_and_noted() -> None:
    notes: list[str] = []
    balancing = pb.LoadBalancing(routing_preference=[0, 6, 77], mode=9, health_policy=9)
    found = read_service(
        pb.Service(hostname="h", load_balancing=balancing, ip_families=9, visibility=9), notes
    )
    assert found.load_balancer == LoadBalancer(
        (Scope.NETWORK,), BalanceMode.STANDARD, HealthPolicy.ONLY_HEALTHY
    )
    assert found.ip_families is None
    assert found.visibility is Visibility.PUBLIC
    assert len(notes) == 5


def test_a_field_from_the_future_is_no_harm() -> None:
    later = pb.Address(workload=a_message()).SerializeToString() + b"\xfa\x07\x02hi"
    assert read_address(later, []) == read_workload(a_message())


def test_a_vip_with_its_full_length_is_one_address() -> None:
    def vip(text: str, **length: int) -> pb.NetworkAddress:
        return pb.NetworkAddress(network="n", address=ip_address(text).packed, **length)

    found = read_service(
        pb.Service(
            hostname="h",
            addresses=[
                vip("10.0.0.1"),
                vip("10.0.0.2", length=32),
                vip("2001:db8::2", length=128),
                vip("10.2.3.4", length=16),
            ],
        )
    )
    ips = [ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "2001:db8::2")]
    assert found.vips == tuple(NetworkAddress("n", ip) for ip in ips)
    assert found.cidr_vips == (NetworkCidr("n", ip_network("10.2.0.0/16")),)


def a_bad_gateway() -> pb.GatewayAddress:
    return pb.GatewayAddress(address=pb.NetworkAddress(address=b"123"))


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.Address(), "type: neither"),
        (pb.Address(workload=pb.Workload()), "workload.uid: empty"),
        (pb.Address(workload=a_message(addresses=[b"12345"])), "workload.addresses: 5 bytes"),
        (pb.Address(workload=a_message(waypoint={})), "workload.waypoint: neither"),
        (
            pb.Address(workload=a_message(network_gateway=a_bad_gateway())),
            "workload.network_gateway.address: 3 bytes",
        ),
        (pb.Address(workload=a_message(services={"bare": {}})), "workload.services: 'bare'"),
        (
            pb.Address(workload=a_message(services={"a/b": {"ports": [{"service_port": 70000}]}})),
            "workload.services: 70000",
        ),
        (
            pb.Address(workload=a_message(application_tunnel={"port": 70000})),
            "workload.application_tunnel.port: 70000",
        ),
        (pb.Address(service=pb.Service()), "service.hostname: empty"),
        (
            pb.Address(service=pb.Service(hostname="h", ports=[{"target_port": 65536}])),
            "service.ports: 65536",
        ),
        (
            pb.Address(
                service=pb.Service(hostname="h", addresses=[{"address": b"1234", "length": 33}])
            ),
            "service.addresses: prefix length 33",
        ),
        (
            pb.Address(service=pb.Service(hostname="h", weighted_waypoints=[{"weight": 1}])),
            "service.weighted_waypoints: neither",
        ),
        (
            pb.Address(
                service=pb.Service(
                    hostname="h", waypoint={"hostname": {}, "hbone_mtls_port": 65536}
                )
            ),
            "service.waypoint.hbone_mtls_port: 65536",
        ),
    ],
)
def test_a_malformed_resource_is_refused_by_the_name_of_the_field(
    message: pb.Address, complaint: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        read_address(message.SerializeToString(), [])
    assert str(caught.value).startswith(complaint)


@given(data=st.binary(max_size=200))
def test_garbage_raises_the_declared_error_only(data: bytes) -> None:
    try:
        read_address(data, [])
    except ResourceError:
        return


def test_pods_of_a_deployment_share_what_is_equal() -> None:
    ports = {"a/b": pb.PortList(ports=[pb.Port(service_port=80, target_port=1)])}
    one, two = (read_workload(a_message(services=ports, namespace="shop")) for _ in range(2))
    assert one.services is two.services
    assert one.namespace is two.namespace


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (a_workload, "lab//Pod/shop/cart-0"),
        (a_service, "shop/cart.shop.svc.cluster.local"),
        (a_policy, "shop/only-frontend"),
    ],
)
def test_names_of_resources(make: Callable[[], Workload], key: str) -> None:
    assert key_of(make()) == key


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"locality": b"\xff"}, "workload.locality: "),
        ({"services": [b"\x0a\x05ab"]}, "workload.services: "),
    ],
)
def test_what_is_kept_as_it_came_is_checked_all_the_same(
    fields: dict[str, Any], complaint: str
) -> None:
    message = pb.ReceivedAddress(workload=pb.ReceivedWorkload(uid="a", **fields))
    with pytest.raises(ResourceError, match=complaint):
        read_address(message.SerializeToString(), [])


def test_the_order_of_services_on_the_wire_does_not_matter() -> None:
    entries = [
        pb.WorkloadService(key=f"shop/{name}.test").SerializeToString() for name in ("a", "b")
    ]
    read = [
        read_address(
            pb.ReceivedAddress(
                workload=pb.ReceivedWorkload(uid="a", services=order)
            ).SerializeToString(),
            [],
        )
        for order in (entries, entries[::-1])
    ]
    assert read[0] == read[1]
    assert read[0].services is read[1].services
