"""The server's end, mostly in conversation with our own client's end."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.errors import PeerError
from ztunnel.wire.delta import Arrived, DeltaSession, NodeInfo, Outgoing, Step, Subscription
from ztunnel.wire.delta_server import RESOURCES_PER_RESPONSE, ServerStream, Snapshot
from ztunnel.wire.encode_resources import encode
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, key_of

NODE = NodeInfo("ztunnel~192.0.2.1~z.system~system.svc.cluster.local", {"NODE_NAME": "n1"})
KEY = "shop/cart.shop.svc.cluster.local"
CART = a_workload("cart-0", services={KEY: {80: 8080}})
ALONE = a_workload("alone", ips=["192.0.2.77"])
SERVICE = a_service(vips=["10.0.0.1"])
POLICY = a_policy()
MESH = Snapshot([CART, ALONE, SERVICE, POLICY])


class Conversation:
    """A client and a server joined; `names` are what arrived in the last exchange."""

    def __init__(self, session: DeltaSession, snapshot: Snapshot) -> None:
        self.session, self.snapshot = session, snapshot
        self.server = ServerStream()
        self.names: list[str] = []
        self.removed: list[str] = []

    def connect(self, wanted: Iterable[str] = ()) -> None:
        self.server = ServerStream()
        self.exchange(outgoing(self.session.connect(list(wanted))))

    def push(self, snapshot: Snapshot, *, only: str | None = None) -> None:
        self.snapshot = snapshot
        self.exchange([], self.server.push(snapshot, only=only))

    def exchange(self, requests: list[bytes], responses: Iterable[bytes] = ()) -> None:
        self.names, self.removed = [], []
        responses = list(responses)
        while requests or responses:
            for request in requests:
                responses += self.server.receive(request, self.snapshot)
            requests = []
            for response in responses:
                steps = list(self.session.receive(response))
                requests += outgoing(steps)
                for step in steps:
                    if isinstance(step, Arrived):
                        self.names += [key_of(resource) for resource in step.resources]
                        self.removed += step.removed
            responses = []


def outgoing(steps: Iterable[Step]) -> list[bytes]:
    return [b"".join(step.pieces) for step in steps if isinstance(step, Outgoing)]


def a_conversation(snapshot: Snapshot = MESH, *, wildcard: bool = True) -> Conversation:
    subscriptions = [Subscription(ADDRESS_TYPE, wildcard), Subscription(AUTHORIZATION_TYPE)]
    conversation = Conversation(DeltaSession(NODE, subscriptions), snapshot)
    conversation.connect()
    return conversation


def names(*resources: Resource) -> set[str]:
    return {key_of(resource) for resource in resources}


def test_a_new_client_gets_everything() -> None:
    conversation = a_conversation()
    assert set(conversation.names) == names(CART, ALONE, SERVICE, POLICY)
    assert conversation.server.acks == 2
    assert conversation.server.refusals == []


def test_an_empty_mesh_is_answered_too() -> None:
    assert a_conversation(Snapshot()).session.is_synced


def test_a_client_that_comes_back_gets_what_differs() -> None:
    conversation = a_conversation()
    changed = a_workload("alone", ips=["192.0.2.78"])
    conversation.snapshot = Snapshot([CART, changed, POLICY])
    conversation.connect()
    assert set(conversation.names) == names(changed)
    assert conversation.removed == [KEY]


def test_policies_are_sent_again_as_they_have_no_version() -> None:
    conversation = a_conversation()
    server = ServerStream()
    requests = outgoing(conversation.session.connect())
    answers = [answer for data in requests for answer in server.receive(data, MESH)]
    sent = [pb.DeltaDiscoveryResponse.FromString(answer) for answer in answers]
    assert [[one.name for one in response.resources] for response in sent] == [[], [POLICY.key]]


def test_many_addresses_come_in_several_responses_and_before_all_policies() -> None:
    pods = [a_workload(f"pod-{i}", ips=[]) for i in range(2 * RESOURCES_PER_RESPONSE + 1)]
    policies = [a_policy(f"policy-{i}") for i in range(RESOURCES_PER_RESPONSE + 1)]
    everything: list[Resource] = [*pods, *policies]
    conversation = a_conversation(Snapshot(everything))
    assert conversation.names == [key_of(resource) for resource in everything]
    assert conversation.server.acks == 4  # policies are one: half of them would mean another thing
    conversation.push(Snapshot())
    assert len(conversation.removed) == len(pods) + len(policies)
    assert conversation.server.refusals == []


def test_a_changed_service_takes_its_workloads_along_which_are_not_looked_at_again() -> None:
    conversation = a_conversation()
    service = a_service(vips=["10.0.0.2"])
    snapshot = Snapshot([CART, ALONE, service, POLICY])
    [response] = conversation.server.push(snapshot)
    sent = [r.name for r in pb.DeltaDiscoveryResponse.FromString(response).resources]
    assert sent == [KEY, key_of(CART)]
    conversation.exchange([], [response])
    assert conversation.names == [KEY]


def test_an_unchanged_mesh_is_not_pushed() -> None:
    assert a_conversation().server.push(Snapshot([CART, ALONE, SERVICE, POLICY])) == []


def test_a_push_of_one_name_looks_at_no_other() -> None:
    conversation = a_conversation()
    snapshot = MESH.with_one(a_workload("alone", ips=["192.0.2.78"]))
    snapshot = snapshot.with_one(a_policy(dry_run=True))
    conversation.push(snapshot, only=key_of(ALONE))
    assert conversation.names == [key_of(ALONE)]
    conversation.push(snapshot)
    assert conversation.names == [key_of(POLICY)]


def test_a_refusal_is_kept_with_its_text() -> None:
    conversation = a_conversation(Snapshot())
    bad = pb.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="x")
    bad.resources.add(name="bad")
    conversation.exchange([], [bad.SerializeToString()])
    assert conversation.server.refusals == ["bad: is of type ''"]


def test_on_demand_nothing_is_sent_before_it_is_asked_for() -> None:
    conversation = a_conversation(wildcard=False)
    assert set(conversation.names) == names(POLICY)


def test_a_vip_brings_the_service_with_its_workloads() -> None:
    conversation = a_conversation(wildcard=False)
    conversation.exchange(conversation.session.ask(["/10.0.0.1"]))
    assert set(conversation.names) == names(SERVICE, CART)


def test_the_workloads_of_the_node_come_unasked_at_once_and_as_they_appear() -> None:
    local, later = (a_workload(name, node="n1") for name in ("local", "later"))
    conversation = a_conversation(Snapshot([local, ALONE]), wildcard=False)
    assert set(conversation.names) == names(local)
    conversation.exchange(conversation.session.ask(["/192.0.2.77"]))
    assert set(conversation.names) == names(ALONE)
    conversation.push(Snapshot([local, later, ALONE]))
    assert set(conversation.names) == names(later)


def test_a_question_also_brings_what_has_come_to_the_node_meanwhile() -> None:
    local = a_workload("local", node="n1")
    conversation = a_conversation(Snapshot([ALONE]), wildcard=False)
    conversation.snapshot = Snapshot([local, ALONE])
    conversation.exchange(conversation.session.ask(["/192.0.2.77"]))
    assert set(conversation.names) == names(local, ALONE)


def test_what_does_not_exist_is_answered_as_removed_and_sent_once_it_does() -> None:
    conversation = a_conversation(Snapshot(), wildcard=False)
    conversation.exchange(conversation.session.ask(["/192.0.2.77"]))
    assert conversation.removed == ["/192.0.2.77"]
    conversation.push(Snapshot([ALONE, CART]))
    assert conversation.names == [key_of(ALONE)]
    conversation.exchange(conversation.session.forget(["/192.0.2.77"]))
    conversation.push(Snapshot([]))
    assert conversation.removed == [key_of(ALONE)]


def test_who_waits_while_connecting_is_answered_at_once() -> None:
    conversation = a_conversation(wildcard=False)
    conversation.connect(["/192.0.2.77", "/192.0.2.99"])
    assert key_of(ALONE) in conversation.names
    assert conversation.removed == ["/192.0.2.99"]
    assert conversation.server.push(MESH) == []


def test_a_first_request_without_a_node_is_refused() -> None:
    with pytest.raises(PeerError, match="node id"):
        ServerStream().receive(pb.DeltaDiscoveryRequest().SerializeToString(), MESH)
    with pytest.raises(PeerError, match="not a request"):
        ServerStream().receive(b"\xff\xff", MESH)


def test_a_strange_type_is_not_answered() -> None:
    request = pb.DeltaDiscoveryRequest(type_url="type.example/Moon")
    request.node.id = "x"
    assert ServerStream().receive(request.SerializeToString(), MESH) == []


def test_a_version_follows_from_the_bytes() -> None:
    again = Snapshot([CART]).of(ADDRESS_TYPE)[key_of(CART)]
    assert again == MESH.of(ADDRESS_TYPE)[key_of(CART)]
    assert again.data == encode(CART)
