"""A client whose streams are cut anywhere, and a server whose mesh changes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings, strategies as st

from tests.support import xds_nouns
from ztunnel.errors import ResourceError
from ztunnel.state.store import Store
from ztunnel.wire import delta_server
from ztunnel.wire.delta import Arrived, DeltaSession, NodeInfo, Outgoing, Step, Subscription
from ztunnel.wire.delta_server import ServerStream, Snapshot
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, key_of
from ztunnel.xds.client import as_update

NODE = NodeInfo("ztunnel~192.0.2.1~z.system~system.svc.cluster.local", {})
WHOLE = 1_000_000  # more steps than any stream here has

a_mesh = st.lists(
    xds_nouns.workloads | xds_nouns.services | xds_nouns.policies, max_size=6, unique_by=key_of
)
a_stream = st.tuples(a_mesh, a_mesh, st.integers(0, 25))


class Client:
    """A session and the store it fills."""

    def __init__(self) -> None:
        subscriptions = [Subscription(ADDRESS_TYPE), Subscription(AUTHORIZATION_TYPE)]
        self.session = DeltaSession(NODE, subscriptions)
        self.store = Store()

    def steps(self, server: ServerStream, first: Snapshot, then: Snapshot) -> Iterator[Step]:
        """Run one stream: all of `first`, then the change to `then`."""
        requests: list[bytes] = []
        for step in self.session.connect():
            yield self._do(step, requests)
        responses: list[bytes] = []
        for snapshot in (first, then):
            responses += server.push(snapshot)
            while requests or responses:
                responses += [a for data in requests for a in server.receive(data, snapshot)]
                requests.clear()
                if responses:
                    for step in self.session.receive(responses.pop(0)):
                        yield self._do(step, requests)

    def _do(self, step: Step, requests: list[bytes]) -> Step:
        if isinstance(step, Outgoing):
            requests.append(b"".join(step.pieces))
        elif isinstance(step, Arrived):
            self.store.apply(as_update(step))
        return step

    def run(self, first: Snapshot, then: Snapshot, *, cut: int) -> ServerStream:
        """Take so many steps of a stream, then lose it, but not between applying and noting."""
        server = ServerStream()
        for count, step in enumerate(self.steps(server, first, then)):
            if count >= cut and not isinstance(step, Arrived):
                break
        return server

    def known(self) -> dict[str, Resource]:
        everything: list[Resource] = [
            *self.store.workloads.all(),
            *self.store.services.all(),
            *self.store.policies.all(),
        ]
        return {key_of(resource): resource for resource in everything}


@settings(max_examples=60, deadline=None)
@given(streams=st.lists(a_stream, max_size=4), last=a_mesh, size=st.integers(1, 3))
def test_wherever_streams_are_cut_the_next_whole_one_makes_all_well(
    streams: list[tuple[list[Resource], list[Resource], int]], last: list[Resource], size: int
) -> None:
    usual = delta_server.RESOURCES_PER_RESPONSE
    delta_server.RESOURCES_PER_RESPONSE = size
    try:
        client = Client()
        for first, then, cut in streams:
            client.run(Snapshot(first), Snapshot(then), cut=cut)
        server = client.run(Snapshot(last), Snapshot(last), cut=WHOLE)
    finally:
        delta_server.RESOURCES_PER_RESPONSE = usual
    assert client.known() == {key_of(resource): resource for resource in last}
    assert server.refusals == []


@settings(max_examples=60, deadline=None)
@given(
    sent=a_mesh,
    places=st.lists(st.integers(0, 10_000), max_size=4),
    values=st.lists(st.integers(0, 255), min_size=4, max_size=4),
    cut=st.integers(0, 10_000),
)
def test_a_garbled_answer_ends_the_stream_or_is_answered_once(
    sent: list[Resource], places: list[int], values: list[int], cut: int
) -> None:
    client = Client()
    list(client.session.connect())
    [garbled, *_] = ServerStream().receive(_first_request(), Snapshot(sent))
    data = bytearray(garbled)
    for place, value in zip(places, values, strict=False):
        data[place % len(data)] = value
    del data[1 + cut % len(data) :]
    requests: list[bytes] = []
    try:
        for step in client.session.receive(bytes(data)):
            if isinstance(step, Arrived):
                client.store.apply(as_update(step))
            elif isinstance(step, Outgoing):
                requests.append(b"".join(step.pieces))
    except ResourceError:
        assert not requests
        assert not client.known()
    else:
        assert len(requests) == 1


def _first_request() -> bytes:
    for step in Client().session.connect():
        if isinstance(step, Outgoing):
            return b"".join(step.pieces)
    raise AssertionError
