from __future__ import annotations

import pytest

from tests.support.builders import a_gateway
from ztunnel.devmesh.kubernetes_terms import parse_manifests
from ztunnel.errors import ResourceError
from ztunnel.model.policy import Policy
from ztunnel.model.service import Service
from ztunnel.model.workload import Health, Locality, NetworkMode, TunnelProtocol, Workload

SHOP = """
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
kind: Node
metadata:
  name: n1
  labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}
---
kind: Pod
metadata:
  name: cart-5d8f-x7k2p
  namespace: shop
  labels: {app: cart, version: v2}
  ownerReferences: [{kind: ReplicaSet, name: cart-5d8f}]
spec:
  nodeName: n1
  serviceAccountName: cart
  containers: [{name: cart, ports: [{name: http, containerPort: 8080}]}]
status: {podIP: 192.0.2.10, podIPs: [{ip: 192.0.2.10}, {ip: "2001:db8::10"}]}
---
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, clusterIP: 10.0.0.1, ports: [{port: 80, targetPort: http}]}
---
kind: ConfigMap
metadata: {name: passed-over, namespace: shop}
---
"""
KEY = "shop/cart.shop.svc.cluster.local"


def a_pod(name: str, *, meta: str = "", spec: str = "", status: str = "podIP: 192.0.2.20") -> str:
    return f"""
---
kind: Pod
metadata: {{name: {name}, namespace: shop{", " + meta if meta else ""}}}
spec: {{{spec}}}
status: {{{status}}}
"""


def workloads(text: str) -> dict[str, Workload]:
    return {w.name: w for w in parse_manifests(text) if isinstance(w, Workload)}


def services(text: str) -> dict[str, Service]:
    return {s.name: s for s in parse_manifests(text) if isinstance(s, Service)}


def policies(text: str) -> dict[str, Policy]:
    return {p.key: p for p in parse_manifests(text) if isinstance(p, Policy)}


def test_a_pod_becomes_a_workload_as_istiod_makes_it() -> None:
    cart = workloads(SHOP)["cart-5d8f-x7k2p"]
    assert cart.uid == "Kubernetes//Pod/shop/cart-5d8f-x7k2p"
    assert str(cart.identity) == "spiffe://cluster.local/ns/shop/sa/cart"
    assert [str(ip) for ip in cart.ips] == ["192.0.2.10", "2001:db8::10"]
    assert cart.protocol is TunnelProtocol.HBONE
    assert cart.health is Health.HEALTHY
    assert (cart.node, cart.locality) == ("n1", Locality("r", "z", ""))
    assert (cart.workload_name, cart.canonical_name) == ("cart", "cart")
    assert (cart.canonical_revision, cart.workload_type) == ("v2", "pod")
    assert cart.services == {KEY: {80: 8080}}


def test_what_else_there_is_becomes_what_it_should() -> None:
    assert len(parse_manifests(SHOP)) == 2
    assert services(SHOP)["cart"].key == KEY
    assert parse_manifests("") == []


@pytest.mark.parametrize(
    ("pod", "protocol"),
    [
        (a_pod("p"), TunnelProtocol.HBONE),
        (a_pod("p", meta="labels: {istio.io/dataplane-mode: none}"), TunnelProtocol.NONE),
        (a_pod("p", spec="hostNetwork: true"), TunnelProtocol.NONE),
    ],
)
def test_who_is_in_the_mesh(pod: str, protocol: TunnelProtocol) -> None:
    assert workloads(SHOP + pod)["p"].protocol is protocol


def test_outside_an_ambient_namespace_a_captured_pod_is_in_the_mesh() -> None:
    pod = a_pod("p", meta="annotations: {ambient.istio.io/redirection: enabled}")
    assert workloads(pod)["p"].protocol is TunnelProtocol.HBONE
    assert workloads(a_pod("p"))["p"].protocol is TunnelProtocol.NONE


def test_a_pod_on_the_hosts_network_is_marked() -> None:
    assert workloads(a_pod("p", spec="hostNetwork: true"))["p"].network_mode is (
        NetworkMode.HOST_NETWORK
    )


@pytest.mark.parametrize(
    ("pod", "health"),
    [
        (a_pod("p"), Health.HEALTHY),
        (
            a_pod("p", status="podIP: 1.2.3.4, conditions: [{type: Ready, status: 'True'}]"),
            Health.HEALTHY,
        ),
        (
            a_pod("p", status="podIP: 1.2.3.4, conditions: [{type: Ready, status: 'False'}]"),
            Health.UNHEALTHY,
        ),
        (a_pod("p", meta="deletionTimestamp: now"), Health.UNHEALTHY),
    ],
)
def test_who_wants_traffic(pod: str, health: Health) -> None:
    assert workloads(pod)["p"].health is health


@pytest.mark.parametrize("status", ["", "podIP: 1.2.3.4, phase: Succeeded"])
def test_a_pod_without_an_address_or_a_future_is_not_sent(status: str) -> None:
    assert workloads(a_pod("p", status=status)) == {}


def test_an_external_name_is_not_sent() -> None:
    text = "kind: Service\nmetadata: {name: away}\nspec: {type: ExternalName}"
    assert services(text) == {}


SELECTED = """
---
kind: AuthorizationPolicy
metadata: {name: only-web, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, rules: [{from: [{source: {principals: [a]}}]}]}
---
kind: AuthorizationPolicy
metadata: {name: everyone, namespace: istio-system}
spec: {selector: {matchLabels: {version: v2}}}
---
kind: AuthorizationPolicy
metadata: {name: all-of-shop, namespace: shop}
spec: {action: DENY}
"""


def test_a_workload_lists_the_policies_that_select_it() -> None:
    found = workloads(SHOP + SELECTED + a_pod("other"))
    assert found["cart-5d8f-x7k2p"].policies == ("shop/only-web", "istio-system/everyone")
    assert found["other"].policies == ()
    assert set(policies(SHOP + SELECTED)) == {
        "shop/only-web",
        "istio-system/everyone",
        "shop/all-of-shop",
    }


def test_strict_mutual_tls_is_a_policy_that_workloads_list() -> None:
    strict = """
---
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
    key = "istio-system/istio_converted_static_strict"
    assert set(policies(SHOP + strict)) == {key}
    assert workloads(SHOP + strict)["cart-5d8f-x7k2p"].policies == (key,)
    assert policies(SHOP) == {}


WAYPOINT = """
---
kind: Gateway
metadata: {name: wp, namespace: shop, labels: {istio.io/waypoint-for: all}}
spec: {gatewayClassName: istio-waypoint}
---
kind: Gateway
metadata: {name: ingress, namespace: shop}
spec: {gatewayClassName: istio}
"""


def test_a_waypoint_is_found_by_name_and_served_by_its_pods() -> None:
    use = SHOP.replace(
        "dataplane-mode: ambient", "dataplane-mode: ambient, istio.io/use-waypoint: wp"
    )
    pod = a_pod("wp-1", meta="labels: {gateway.networking.k8s.io/gateway-name: wp}")
    found = workloads(use + WAYPOINT + pod)
    gateway = a_gateway("shop/wp.shop.svc.cluster.local")
    assert found["cart-5d8f-x7k2p"].waypoint == gateway
    assert services(use + WAYPOINT)["cart"].waypoint == gateway
    assert "ingress" not in services(use + WAYPOINT)
    waypoint = found["wp-1"]
    assert waypoint.waypoint is None
    assert waypoint.native_tunnel
    assert waypoint.services == {"shop/wp.shop.svc.cluster.local": {15008: 15008}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: [", "not YAML"),
        ("- a list", "document: expected a map"),
        ("kind: Pod", "metadata.name"),
        (a_pod("p", status="podIP: nowhere"), "Pod shop/p: .*nowhere"),
        ("kind: Service\nmetadata: {name: s}\nspec: {ports: 3}", "Service default/s: ports"),
    ],
)
def test_what_is_malformed_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ResourceError, match=complaint):
        parse_manifests(text)
