from __future__ import annotations

import trio

from tests.support.builders import a_flow, a_service, a_workload, an_identity
from tests.support.flow import Mesh, a_mesh
from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint
from ztunnel.model.workload import Workload
from ztunnel.proxy.labels import describe_admission, label_hop, name_hop
from ztunnel.proxy.requests import TunnelRequest
from ztunnel.telemetry.access_log import Direction, Record
from ztunnel.telemetry.traffic import NOBODY, Labels

CART = a_workload("cart-0", sa="cart", ips=["192.0.2.10"])
SHOP = a_workload("shop-0", sa="frontend", ips=["192.0.2.1"])
SERVICE = a_service("cart.shop.svc.cluster.local")
CART_NAME, SHOP_NAME = an_identity("cart"), an_identity("frontend")
BAGGAGE = b"k8s.namespace.name=far,k8s.deployment.name=caller,k8s.cluster.name=other"


def a_record(mesh: Mesh, direction: Direction) -> Record:
    return Record(
        log=mesh.node.access_log,
        direction=direction,
        source=Endpoint.parse("192.0.2.1:40000"),
        started=trio.current_time(),
    )


def a_hop(protocol: HopProtocol, **more) -> Hop:
    peer = Endpoint.parse("192.0.2.10:15008")
    return Hop(protocol=protocol, peer=peer, **more)


def describe_hop(record: Record, identity: Identity, workload: Workload, hop: Hop) -> Labels:
    name_hop(record, identity, workload, hop)
    return label_hop(identity, workload, hop)


async def test_in_a_tunnel_both_ends_have_an_identity() -> None:
    async with a_mesh() as mesh:
        record = a_record(mesh, Direction.OUTBOUND)
        authority = Endpoint.parse("192.0.2.10:8080")
        hop = a_hop(HopProtocol.HBONE, workload=CART, service=SERVICE, authority=authority)
        labels = describe_hop(record, SHOP_NAME, SHOP, hop)
        assert (record.source_identity, record.destination_identity) == (SHOP_NAME, CART_NAME)
        assert (record.destination, record.hbone_target) == (hop.peer, authority)
        assert record.destination_service == SERVICE.hostname
        assert labels.mutual_tls
        assert labels.source.principal == str(SHOP_NAME)


async def test_outside_a_tunnel_no_identity_is_claimed() -> None:
    async with a_mesh() as mesh:
        record = a_record(mesh, Direction.OUTBOUND)
        labels = describe_hop(record, SHOP_NAME, SHOP, a_hop(HopProtocol.TCP, workload=CART))
        assert record.source_identity is record.destination_identity is None
        assert not labels.mutual_tls
        assert labels.source.principal == ""


async def test_where_nobody_is_known_nobody_is_named() -> None:
    async with a_mesh() as mesh:
        record = a_record(mesh, Direction.OUTBOUND)
        labels = describe_hop(record, SHOP_NAME, SHOP, a_hop(HopProtocol.TCP))
        assert labels.destination == NOBODY
        assert record.destination_workload is None
        assert record.source_workload == "shop-0"


def describe(mesh: Mesh, record: Record, **more) -> Labels:
    return describe_admission(
        record,
        mesh.node,
        **{
            "workload": CART,
            "identity": CART_NAME,
            "flow": a_flow(by=SHOP_NAME),
            "service": SERVICE,
            "request": TunnelRequest.read([(b"baggage", BAGGAGE)]),
        }
        | more,
    )


async def test_a_caller_whose_address_we_know_is_named_by_what_we_know() -> None:
    async with a_mesh() as mesh:
        mesh.put(SHOP)
        record = a_record(mesh, Direction.INBOUND)
        labels = describe(mesh, record)
        assert (record.source_workload, record.source_namespace) == ("shop-0", "shop")
        assert labels.source.principal == str(SHOP_NAME)
        assert (record.destination_workload, record.destination_identity) == ("cart-0", CART_NAME)


async def test_an_unknown_caller_is_named_by_its_baggage_but_never_its_principal() -> None:
    async with a_mesh() as mesh:
        record = a_record(mesh, Direction.INBOUND)
        labels = describe(mesh, record)
        assert (record.source_workload, record.source_namespace) == ("caller", "far")
        assert record.source_cluster == "other"
        assert labels.source.principal == str(SHOP_NAME)
        assert record.source_identity == SHOP_NAME


async def test_through_a_gateway_the_callers_address_says_nothing() -> None:
    async with a_mesh() as mesh:
        mesh.put(SHOP)
        record = a_record(mesh, Direction.INBOUND)
        crossed = TunnelRequest.read([(b"baggage", BAGGAGE), (b"x-forwarded-network", b"far")])
        describe(mesh, record, request=crossed)
        assert record.source_workload == "caller"


async def test_where_baggage_is_switched_off_an_unknown_caller_has_its_principal_only() -> None:
    async with a_mesh(baggage_enabled=False) as mesh:
        record = a_record(mesh, Direction.INBOUND)
        labels = describe(mesh, record)
        assert record.source_workload is None
        assert labels.source == NOBODY._replace(principal=str(SHOP_NAME))


async def test_plaintext_has_no_identities() -> None:
    async with a_mesh() as mesh:
        record = a_record(mesh, Direction.INBOUND)
        labels = describe(mesh, record, flow=a_flow(by="nobody"), request=None)
        assert record.source_identity is record.destination_identity is None
        assert labels.source == NOBODY
        assert not labels.mutual_tls
