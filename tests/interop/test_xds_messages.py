"""Our delta xDS against the message types of another project (PyPI: xds-protos)."""

from __future__ import annotations

from datetime import timedelta

from envoy.service.discovery.v3 import discovery_pb2 as theirs
from google.protobuf.any_pb2 import Any

from tests.support.builders import a_policy, a_workload
from ztunnel.wire.delta import (
    Arrived,
    DeltaSession,
    Handled,
    NodeInfo,
    Outgoing,
    Step,
    Subscription,
)
from ztunnel.wire.delta_server import ServerStream, Snapshot
from ztunnel.wire.encode_resources import encode
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE

NODE = NodeInfo("ztunnel~192.0.2.1~a.b~b.svc.cluster.local", {"NODE_NAME": "n1", "X": [1, None]})
CART = a_workload("cart-0", workload_type="pod", cluster_id="Kubernetes")


def a_session() -> DeltaSession:
    return DeltaSession(NODE, [Subscription(ADDRESS_TYPE, False), Subscription(AUTHORIZATION_TYPE)])


def sent(steps: list[Step]) -> list[theirs.DeltaDiscoveryRequest]:
    data = [b"".join(step.pieces) for step in steps if isinstance(step, Outgoing)]
    return [theirs.DeltaDiscoveryRequest.FromString(message) for message in data]


def a_response(**more: object) -> theirs.DeltaDiscoveryResponse:
    resource = theirs.Resource(
        name=CART.uid,
        aliases=["/192.0.2.10"],
        version="v1",
        resource=Any(type_url=ADDRESS_TYPE, value=encode(CART)),
        ttl=timedelta(seconds=60),
        cache_control=theirs.Resource.CacheControl(do_not_cache=True),
    )
    response = theirs.DeltaDiscoveryResponse(
        system_version_info="istiod",
        type_url=ADDRESS_TYPE,
        nonce="n1",
        resources=[resource],
        removed_resources=["shop/gone"],
        **more,
    )
    response.control_plane.identifier = '{"Component":"istiod"}'
    return response


def test_our_first_requests_say_to_them_what_we_mean() -> None:
    session = a_session()
    list(session.receive(a_response().SerializeToString()))
    address, authorization = sent(list(session.connect(["/192.0.2.9"])))
    assert address.type_url == ADDRESS_TYPE
    assert address.node.id == NODE.id
    assert address.node.metadata["NODE_NAME"] == "n1"
    assert list(address.node.metadata["X"]) == [1, None]
    assert list(address.resource_names_subscribe) == ["*"]
    assert list(address.resource_names_unsubscribe) == ["*"]
    assert dict(address.initial_resource_versions) == {CART.uid: "v1", "/192.0.2.9": ""}
    assert authorization.type_url == AUTHORIZATION_TYPE


def test_their_response_is_understood_with_all_it_carries() -> None:
    steps = list(a_session().receive(a_response().SerializeToString()))
    [arrived] = [step for step in steps if isinstance(step, Arrived)]
    assert arrived == Arrived(ADDRESS_TYPE, [CART], ["shop/gone"])
    [handled] = [step for step in steps if isinstance(step, Handled)]
    assert set(handled.answered) == {CART.uid, "/192.0.2.10", "shop/gone"}
    [answer] = sent(steps)
    assert answer == theirs.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce="n1")


def test_our_refusal_is_an_error_of_theirs() -> None:
    response = a_response()
    response.resources[0].resource.value = b"garbage"
    [answer] = sent(list(a_session().receive(response.SerializeToString())))
    assert answer.response_nonce == "n1"
    assert answer.error_detail.code == 3
    assert answer.error_detail.message.startswith(f"{CART.uid}: not an Address")


def test_our_server_answers_their_request_in_their_words() -> None:
    request = theirs.DeltaDiscoveryRequest(type_url=AUTHORIZATION_TYPE)
    request.node.id = NODE.id
    request.initial_resource_versions["shop/gone"] = ""
    [data] = ServerStream().receive(request.SerializeToString(), Snapshot([a_policy()]))
    response = theirs.DeltaDiscoveryResponse.FromString(data)
    assert response.type_url == AUTHORIZATION_TYPE
    assert response.nonce != ""
    assert [resource.name for resource in response.resources] == ["shop/only-frontend"]
    assert response.resources[0].resource == Any(
        type_url=AUTHORIZATION_TYPE, value=encode(a_policy())
    )
    assert list(response.removed_resources) == ["shop/gone"]
