from __future__ import annotations

from tests.support.builders import a_flow, a_service, a_workload, an_identity
from tests.support.flow import Mesh, a_mesh
from ztunnel.decide.admit import Admission
from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.model.network import Endpoint
from ztunnel.proxy.labels import Description, describe_admission, describe_far_side, describe_hop
from ztunnel.proxy.requests import TunnelRequest
from ztunnel.telemetry.traffic import NOBODY
from ztunnel.wire.headers import parse_baggage

CART = a_workload("cart-0", sa="cart", ips=["192.0.2.10"])
SHOP = a_workload("shop-0", sa="frontend", ips=["192.0.2.1"])
SERVICE = a_service("cart.shop.svc.cluster.local")
CART_NAME, SHOP_NAME = an_identity("cart"), an_identity("frontend")
BAGGAGE = b"k8s.namespace.name=far,k8s.deployment.name=caller,k8s.cluster.name=other"


TARGET = Endpoint.parse("192.0.2.10:8080")


def a_hop(protocol: HopProtocol, **more) -> Hop:
    peer = Endpoint.parse("192.0.2.10:15008")
    return Hop(protocol=protocol, peer=peer, **more)


def test_in_a_tunnel_both_ends_have_an_identity() -> None:
    hop = a_hop(HopProtocol.HBONE, workload=CART, service=SERVICE, authority=TARGET)
    ends, labels = describe_hop(SHOP_NAME, SHOP, hop)
    assert (ends.source_identity, ends.destination_identity) == (SHOP_NAME, CART_NAME)
    assert (ends.destination, ends.hbone_target) == (hop.peer, TARGET)
    assert ends.destination_service == SERVICE.hostname
    assert labels.mutual_tls
    assert labels.source.principal == str(SHOP_NAME)


def test_outside_a_tunnel_no_identity_is_claimed() -> None:
    ends, labels = describe_hop(SHOP_NAME, SHOP, a_hop(HopProtocol.TCP, workload=CART))
    assert ends.source_identity is ends.destination_identity is None
    assert not labels.mutual_tls
    assert labels.source.principal == ""


def test_where_nobody_is_known_nobody_is_named() -> None:
    ends, labels = describe_hop(SHOP_NAME, SHOP, a_hop(HopProtocol.TCP))
    assert labels.destination == NOBODY
    assert ends.destination_workload is None
    assert ends.source_workload == "shop-0"


def test_the_far_side_of_two_tunnels_is_what_it_says_it_is() -> None:
    near = describe_hop(SHOP_NAME, SHOP, a_hop(HopProtocol.DOUBLE_HBONE, authority=TARGET))
    far = describe_far_side(near, parse_baggage([BAGGAGE]), CART_NAME)
    assert (far.ends.destination_workload, far.ends.destination_cluster) == ("caller", "other")
    assert far.ends.destination_identity == CART_NAME
    assert far.ends.source_workload == "shop-0"
    assert far.labels.destination.namespace == "far"
    assert near.ends.destination_workload is None  # others may share it


def describe(mesh: Mesh, **more) -> Description:
    admission = Admission(destination=TARGET, dial=TARGET, service=SERVICE)
    return describe_admission(
        mesh.node,
        admission,
        **{
            "workload": CART,
            "identity": CART_NAME,
            "flow": a_flow(by=SHOP_NAME),
            "local": Endpoint.parse("192.0.2.10:15008"),
            "request": TunnelRequest.read([(b"baggage", BAGGAGE)]),
            "target": TARGET,
        }
        | more,
    )


async def test_a_caller_whose_address_we_know_is_named_by_what_we_know() -> None:
    async with a_mesh() as mesh:
        mesh.put(SHOP)
        ends, labels = describe(mesh)
        assert (ends.source_workload, ends.source_namespace) == ("shop-0", "shop")
        assert labels.source.principal == str(SHOP_NAME)
        assert (ends.destination_workload, ends.destination_identity) == ("cart-0", CART_NAME)
        assert (ends.destination_service, ends.hbone_target) == (SERVICE.hostname, TARGET)


async def test_an_unknown_caller_is_named_by_its_baggage_but_never_its_principal() -> None:
    async with a_mesh() as mesh:
        ends, labels = describe(mesh)
        assert (ends.source_workload, ends.source_namespace) == ("caller", "far")
        assert ends.source_cluster == "other"
        assert labels.source.principal == str(SHOP_NAME)
        assert ends.source_identity == SHOP_NAME


async def test_through_a_gateway_the_callers_address_says_nothing() -> None:
    async with a_mesh() as mesh:
        mesh.put(SHOP)
        crossed = TunnelRequest.read([(b"baggage", BAGGAGE), (b"x-forwarded-network", b"far")])
        assert describe(mesh, request=crossed).ends.source_workload == "caller"


async def test_where_baggage_is_switched_off_an_unknown_caller_has_its_principal_only() -> None:
    async with a_mesh(baggage_enabled=False) as mesh:
        ends, labels = describe(mesh)
        assert ends.source_workload is None
        assert labels.source == NOBODY._replace(principal=str(SHOP_NAME))


async def test_plaintext_has_no_identities() -> None:
    async with a_mesh() as mesh:
        ends, labels = describe(mesh, flow=a_flow(by="nobody"), request=None, target=None)
        assert ends.source_identity is ends.destination_identity is None
        assert labels.source == NOBODY
        assert not labels.mutual_tls
