"""Conversations of the client's session with scripted servers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tests.support import builders, xds_nouns
from tests.support.builders import a_policy, a_service
from ztunnel.errors import ResourceError
from ztunnel.model.policy import Match
from ztunnel.model.workload import Workload
from ztunnel.wire import delta
from ztunnel.wire.delta import (
    Arrived,
    DeltaSession,
    Handled,
    NodeInfo,
    Outgoing,
    Paused,
    Step,
    Subscription,
)
from ztunnel.wire.encode_resources import encode, type_of
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, key_of

NODE = NodeInfo("ztunnel~192.0.2.1~z.system~system.svc.cluster.local", {"NODE_NAME": "n1"})


def a_workload(name: str, **more: Any) -> Workload:
    """Make a workload as one that came over the wire."""
    return builders.a_workload(name, workload_type="pod", cluster_id="Kubernetes", **more)


CART = a_workload("cart-0")
CART_NAME = "lab//Pod/shop/cart-0"


def a_session(*, wildcard: bool = True) -> DeltaSession:
    return DeltaSession(
        NODE, [Subscription(ADDRESS_TYPE, wildcard), Subscription(AUTHORIZATION_TYPE)]
    )


def an_envelope(resource: Resource, version: str = "", **fields: object) -> pb.Resource:
    envelope = pb.Resource(**{"name": key_of(resource), "version": version, **fields})
    envelope.resource.type_url = type_of(resource)
    envelope.resource.value = encode(resource)
    return envelope


def a_response(
    *envelopes: pb.Resource, url: str = ADDRESS_TYPE, removed: Iterable[str] = (), nonce: str = "n"
) -> bytes:
    return pb.DeltaDiscoveryResponse(
        resources=envelopes, type_url=url, removed_resources=removed, nonce=nonce
    ).SerializeToString()


def requests(steps: Iterable[Step]) -> list[pb.DeltaDiscoveryRequest]:
    found = [b"".join(step.pieces) for step in steps if isinstance(step, Outgoing)]
    return [pb.DeltaDiscoveryRequest.FromString(data) for data in found]


def receive(session: DeltaSession, data: bytes) -> tuple[list[Arrived], pb.DeltaDiscoveryRequest]:
    steps = list(session.receive(data))
    [answer] = requests(steps)
    return [step for step in steps if isinstance(step, Arrived)], answer


def handled(session: DeltaSession, data: bytes) -> Handled:
    *_, last = session.receive(data)
    assert isinstance(last, Handled)
    return last


def versions_told(session: DeltaSession) -> list[Mapping[str, str]]:
    return [dict(request.initial_resource_versions) for request in requests(session.connect())]


def test_the_first_stream_asks_for_all_in_order_and_says_who_we_are() -> None:
    address, authorization = requests(a_session().connect())
    assert address.type_url == ADDRESS_TYPE
    assert authorization.type_url == AUTHORIZATION_TYPE
    for request in (address, authorization):
        assert request.node.id == NODE.id
        assert request.node.metadata["NODE_NAME"] == "n1"
        assert not request.resource_names_subscribe
        assert not request.initial_resource_versions
        assert not request.response_nonce


def test_what_arrives_is_handed_over_then_acknowledged_with_nothing_but_the_nonce() -> None:
    session = a_session()
    [arrived], answer = receive(session, a_response(an_envelope(CART, "v1"), nonce="7"))
    assert arrived == Arrived(ADDRESS_TYPE, [CART], [])
    assert answer == pb.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce="7")


def test_the_next_stream_tells_what_we_hold() -> None:
    session = a_session()
    receive(session, a_response(an_envelope(CART, "v1"), an_envelope(a_service(), "v2")))
    receive(session, a_response(an_envelope(a_policy()), url=AUTHORIZATION_TYPE))
    assert versions_told(session) == [
        {CART_NAME: "v1", "shop/cart.shop.svc.cluster.local": "v2"},
        {"shop/only-frontend": ""},
    ]


def test_what_is_removed_is_not_told_any_more() -> None:
    session = a_session()
    receive(session, a_response(an_envelope(CART, "v1")))
    [arrived], _ = receive(session, a_response(removed=[CART_NAME, "never/heard-of"]))
    assert arrived == Arrived(ADDRESS_TYPE, [], [CART_NAME, "never/heard-of"])
    assert versions_told(session)[0] == {}


def test_a_bad_resource_is_refused_alone_and_named_with_its_field() -> None:
    session = a_session()
    bad = an_envelope(a_workload("bad"), "v1")
    bad.resource.value = b"\x0a\x07\xa2\x01\x01u\x1a\x01x"  # a workload with an address of one byte
    nameless = pb.Resource()
    response = a_response(an_envelope(CART, "v1"), bad, nameless)
    [arrived], answer = receive(session, response)
    assert arrived.resources == [CART]
    assert answer.error_detail.code == 3
    assert answer.error_detail.message == (
        "lab//Pod/shop/bad: workload.addresses: 1 bytes are not an IP address; "
        "resource 2: is of type ''"
    )
    assert versions_told(session)[0] == {CART_NAME: "v1"}


def test_a_resource_that_turns_bad_keeps_the_version_it_had() -> None:
    session = a_session()
    receive(session, a_response(an_envelope(CART, "v1")))
    bad = an_envelope(CART, "v2")
    bad.resource.value = b"garbage"
    arrived, _ = receive(session, a_response(bad))
    assert arrived == []
    assert versions_told(session)[0] == {CART_NAME: "v1"}


def test_a_resource_under_a_strange_name_is_refused() -> None:
    _, answer = receive(a_session(), a_response(an_envelope(CART, "v1", name="somebody")))
    assert answer.error_detail.message == f"somebody: describes {CART_NAME!r}"


def test_a_version_we_hold_is_not_looked_at_again() -> None:
    session = a_session()
    receive(session, a_response(an_envelope(CART, "v1")))
    same = an_envelope(CART, "v1")
    same.resource.value = b"would not decode"
    arrived, answer = receive(session, a_response(same))
    assert arrived == []
    assert not answer.HasField("error_detail")


def test_policies_have_no_version_and_are_always_looked_at() -> None:
    session = a_session()
    for policy in (a_policy(), a_policy(dry_run=True)):
        [arrived], _ = receive(session, a_response(an_envelope(policy), url=AUTHORIZATION_TYPE))
        assert arrived.resources == [policy]


def test_what_is_both_sent_and_removed_is_removed() -> None:
    session = a_session()
    [arrived], _ = receive(session, a_response(an_envelope(CART, "v1"), removed=[CART_NAME]))
    assert arrived == Arrived(ADDRESS_TYPE, [], [CART_NAME])
    assert versions_told(session)[0] == {}


def test_what_is_sent_twice_counts_as_it_was_sent_last() -> None:
    session = a_session()
    newer = a_workload("cart-0", ips=["192.0.2.99"])
    envelopes = (an_envelope(CART, "v1"), an_envelope(newer, "v2"))
    [arrived], _ = receive(session, a_response(*envelopes))
    assert arrived.resources == [newer]
    assert versions_told(session)[0] == {CART_NAME: "v2"}


def test_a_type_we_did_not_ask_for_changes_nothing_and_is_refused() -> None:
    session = a_session()
    arrived, answer = receive(session, a_response(an_envelope(CART), url="type.example/Moon"))
    assert arrived == []
    assert answer.type_url == "type.example/Moon"
    assert "did not subscribe" in answer.error_detail.message
    assert handled(session, a_response(url="type.example/Moon")).type_url is None


def test_what_is_no_response_ends_the_stream() -> None:
    with pytest.raises(ResourceError):
        list(a_session().receive(b"\xff\xff"))


def test_synced_means_every_type_was_handled_also_badly_and_also_empty() -> None:
    session = a_session()
    bad = an_envelope(CART, "v1")
    bad.resource.value = b"garbage"
    receive(session, a_response(bad))
    assert not session.is_synced
    receive(session, a_response(url=AUTHORIZATION_TYPE))
    assert session.is_synced


SLICE = delta.RESOURCES_PER_STEP[ADDRESS_TYPE]


def many(count: int, version: str = "v") -> list[pb.Resource]:
    return [an_envelope(a_workload(f"w-{i}"), version) for i in range(count)]


def test_a_large_response_goes_over_in_slices_with_removals_last() -> None:
    arrived, _ = receive(a_session(), a_response(*many(2 * SLICE + 5), removed=["x/y"]))
    assert [len(part.resources) for part in arrived] == [SLICE, SLICE, 5]
    assert [list(part.removed) for part in arrived] == [[], [], ["x/y"]]


def test_the_envelope_of_a_large_response_is_read_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delta, "FIELDS_PER_STEP", 10)
    steps = list(a_session().receive(a_response(*many(35))))
    assert sum(isinstance(step, Paused) for step in steps) == 3
    assert sum(len(step.resources) for step in steps if isinstance(step, Arrived)) == 35


def test_very_many_removals_go_over_in_slices_too() -> None:
    session = a_session()
    most = delta.REMOVED_PER_STEP
    there = many(2 * most + 5)
    receive(session, a_response(*there))
    gone = [envelope.name for envelope in there]
    steps = session.receive(a_response(there[0], removed=gone))
    parts = [step for step in itertools.islice(steps, 2) if isinstance(step, Arrived)]
    steps.close()
    assert [len(part.removed) for part in parts] == [most, most]
    assert len(versions_told(session)[0]) == len(there) - most  # the second may not be applied
    parts, _ = receive(session, a_response(there[0], removed=gone))
    assert [len(part.removed) for part in parts] == [most, most, 5]
    assert {name for part in parts for name in part.removed} == set(gone)
    assert versions_told(session)[0] == {}


def test_a_session_cut_between_slices_claims_only_what_was_applied() -> None:
    session = a_session()
    steps = session.receive(a_response(*many(2 * SLICE)))
    seen = 0
    while seen < 2:
        seen += isinstance(next(steps), Arrived)
    steps.close()
    assert len(versions_told(session)[0]) == SLICE


def test_policies_are_never_seen_in_part_once_pods_are_served() -> None:
    session = a_session()
    count = delta.RESOURCES_PER_STEP[AUTHORIZATION_TYPE] + 1
    first, later = (
        [an_envelope(a_policy(f"p-{i}", match=match)) for i in range(count)]
        for match in (None, Match(destination_ports=(80,)))
    )
    arrived, _ = receive(session, a_response(*first, url=AUTHORIZATION_TYPE))
    assert [len(part.resources) for part in arrived] == [count - 1, 1]
    arrived, _ = receive(session, a_response(*later, url=AUTHORIZATION_TYPE))
    assert [len(part.resources) for part in arrived] == [count]


def test_what_has_no_version_is_looked_at_again_only_if_it_differs() -> None:
    session = a_session()
    one, same, other = a_policy("one"), a_policy("same"), a_policy("one", dry_run=True)
    receive(session, a_response(*map(an_envelope, (one, same)), url=AUTHORIZATION_TYPE))
    again = a_response(*map(an_envelope, (other, same)), url=AUTHORIZATION_TYPE)
    assert [list(part.resources) for part in receive(session, again)[0]] == [[other]]
    assert versions_told(session)[1] == {"shop/one": "", "shop/same": ""}


@pytest.mark.parametrize("version", ["v", ""])
def test_many_versions_are_told_in_slices(version: str) -> None:
    session = a_session()
    receive(session, a_response(*many(200, version)))
    steps = list(session.connect())
    assert sum(isinstance(step, Paused) for step in steps) > 10
    pieces = next(step.pieces for step in steps if isinstance(step, Outgoing))
    assert max(map(len, pieces)) < 1000
    assert len(requests(steps)[0].initial_resource_versions) == 200


def test_a_nack_stays_short_enough_to_read() -> None:
    broken = [pb.Resource(name="n" * 1000) for _ in range(50)]
    result = handled(a_session(), a_response(*broken))
    _, answer = receive(a_session(), a_response(*broken))
    assert result.rejections == 50
    assert len(result.rejected) == delta.REJECTIONS_SHOWN
    assert len(answer.error_detail.message) < 7000
    assert answer.error_detail.message.endswith("and 30 more")


def test_bytes_and_unknown_values_are_reported() -> None:
    odd = an_envelope(CART, "v1")
    odd.resource.value = b"\x0a\x19\xa2\x01\x14" + CART_NAME.encode() + b"\x28\x09"
    result = handled(a_session(), a_response(odd))
    assert result.value_bytes == 27
    assert result.rejections == 0
    assert result.notes == (f"{CART_NAME}: tunnel_protocol: 9 is not known; taken as TCP",)


def test_on_demand_subscribes_to_nothing_but_tells_what_is_held_and_waited_for() -> None:
    session = a_session(wildcard=False)
    receive(session, a_response(an_envelope(CART, "v1")))
    address, _ = requests(session.connect(["/192.0.2.9"]))
    assert list(address.resource_names_subscribe) == ["*"]
    assert list(address.resource_names_unsubscribe) == ["*"]
    assert dict(address.initial_resource_versions) == {CART_NAME: "v1", "/192.0.2.9": ""}


def test_on_demand_only_policies_count_for_being_synced() -> None:
    session = a_session(wildcard=False)
    receive(session, a_response(url=AUTHORIZATION_TYPE))
    assert session.is_synced


def test_a_name_is_asked_for_once_until_it_is_answered() -> None:
    session = a_session(wildcard=False)
    list(session.connect(["/192.0.2.9"]))
    assert session.ask(["/192.0.2.9"]) == []
    [request] = session.ask(["/192.0.2.10", "/192.0.2.10"])
    asked = pb.DeltaDiscoveryRequest.FromString(request)
    assert asked == pb.DeltaDiscoveryRequest(
        type_url=ADDRESS_TYPE, resource_names_subscribe=["/192.0.2.10"]
    )


def test_a_name_that_was_answered_is_given_up_before_it_is_asked_for_again() -> None:
    session = a_session(wildcard=False)
    list(session.connect())
    session.ask(["/192.0.2.10"])
    receive(session, a_response(removed=["/192.0.2.10"]))
    first, second = (
        pb.DeltaDiscoveryRequest.FromString(data) for data in session.ask(["/192.0.2.10"])
    )
    assert list(first.resource_names_unsubscribe) == ["/192.0.2.10"]
    assert list(second.resource_names_subscribe) == ["/192.0.2.10"]


def test_only_what_was_asked_for_can_be_given_up() -> None:
    session = a_session(wildcard=False)
    list(session.connect())
    session.ask(["a/b"])
    [request] = session.forget(["a/b", "c/d"])
    assert list(pb.DeltaDiscoveryRequest.FromString(request).resource_names_unsubscribe) == ["a/b"]
    assert session.forget(["a/b"]) == []


def test_answers_are_known_by_every_name_but_not_those_of_what_was_refused() -> None:
    session = a_session(wildcard=False)
    bad = an_envelope(a_workload("bad"), "v1", aliases=["/192.0.2.66"])
    bad.resource.value = b"garbage"
    good = an_envelope(CART, "v1", aliases=["/192.0.2.10"])
    result = handled(session, a_response(good, bad, removed=["/192.0.2.9"]))
    assert set(result.answered) == {CART_NAME, "/192.0.2.10", "/192.0.2.9"}


@settings(max_examples=60)
@given(data=st.binary(max_size=300), url=st.sampled_from([ADDRESS_TYPE, AUTHORIZATION_TYPE]))
def test_garbage_inside_a_resource_is_always_answered(data: bytes, url: str) -> None:
    envelope = pb.Resource(name="x")
    envelope.resource.type_url = url
    envelope.resource.value = data
    _, answer = receive(a_session(), a_response(envelope, url=url))
    assert answer.response_nonce == "n"


@settings(max_examples=60)
@given(data=st.binary(max_size=300))
def test_a_garbled_response_raises_the_declared_error_only(data: bytes) -> None:
    try:
        list(a_session().receive(a_response(an_envelope(CART)) + data))
    except ResourceError:
        return


@settings(max_examples=40)
@given(data=st.data())
def test_versions_are_those_of_what_was_handed_over(data: st.DataObject) -> None:
    session, held = a_session(), {}
    for number in range(data.draw(st.integers(1, 4))):
        sent = data.draw(st.lists(xds_nouns.workloads | xds_nouns.services, max_size=4))
        removed = data.draw(st.lists(st.sampled_from(["x", "lab//Pod/a/1", "shop/a"]), max_size=2))
        envelopes = [an_envelope(resource, f"v{number}") for resource in sent]
        arrived, _ = receive(session, a_response(*envelopes, removed=removed))
        for part in arrived:
            held.update({key_of(resource): f"v{number}" for resource in part.resources})
            for name in part.removed:
                held.pop(name, None)
    assert versions_told(session)[0] == held
