from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import ResourceError
from ztunnel.wire import delta_response
from ztunnel.wire.delta_response import DeltaResponse
from ztunnel.wire.pb import xds_pb2 as pb

TEXTS = st.text(max_size=20)
RESPONSES = st.builds(
    pb.DeltaDiscoveryResponse,
    system_version_info=TEXTS,
    type_url=TEXTS,
    nonce=TEXTS,
    removed_resources=st.lists(TEXTS, max_size=3),
    resources=st.lists(
        st.builds(pb.Resource, name=st.text(max_size=200), aliases=st.lists(TEXTS, max_size=2)),
        max_size=5,
    ),
)


def scanned(data: bytes, fields: int = 1000) -> DeltaResponse:
    response = DeltaResponse(data)
    while response.scan(fields):
        pass
    return response


@given(message=RESPONSES, fields=st.integers(1, 5))
def test_what_was_encoded_is_found_however_few_fields_at_a_time(
    message: pb.DeltaDiscoveryResponse, fields: int
) -> None:
    found = scanned(message.SerializeToString(), fields)
    assert found.type_url == message.type_url
    assert found.nonce == message.nonce
    assert found.removed == list(message.removed_resources)
    taken: list[str] = []
    while some := found.take_removed(fields):
        assert len(some) <= fields
        taken = some + taken
    assert taken == list(message.removed_resources)
    assert not found.take_removed(0)
    assert [found.resource(i) for i in range(len(found))] == list(message.resources)


@given(data=st.binary(max_size=200))
def test_garbage_raises_the_declared_error_only(data: bytes) -> None:
    try:
        response = scanned(data, 3)
        for number in range(len(response)):
            response.resource(number)
    except ResourceError:
        return


@given(message=RESPONSES, cut=st.integers(1, 50))
def test_a_response_that_is_cut_is_refused_or_ends_between_fields(
    message: pb.DeltaDiscoveryResponse, cut: int
) -> None:
    data = message.SerializeToString()[:-cut]
    try:
        found = scanned(data)
    except ResourceError:
        return
    assert len(found) <= len(message.resources)


def test_fields_of_every_length_are_passed_over() -> None:
    varint, fixed64, fixed32 = b"\x78\xff\xff\x01", b"\x79" + bytes(8), b"\x7d" + bytes(4)
    control_plane = b"\x3a\x02\x0a\x00"
    tail = pb.DeltaDiscoveryResponse(nonce="n").SerializeToString()
    assert scanned(varint + fixed64 + fixed32 + control_plane + tail).nonce == "n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x12\x05ab", id="shorter than it says"),
        pytest.param(b"\x12" + b"\xff" * 11, id="a length without end"),
        pytest.param(b"\x7b\x7c", id="a group"),
        pytest.param(b"\x02\x00", id="field zero"),
        pytest.param(b"\x22\x01\xff", id="a type that is no text"),
        pytest.param(b"\x79abc", id="half a number"),
    ],
)
def test_what_is_no_response_is_refused(data: bytes) -> None:
    with pytest.raises(ResourceError, match="not a response"):
        scanned(data)


def test_one_broken_resource_does_not_spoil_the_others() -> None:
    sound = pb.DeltaDiscoveryResponse(resources=[pb.Resource(name="a")]).SerializeToString()
    response = scanned(b"\x12\x02\x1a\xff" + sound)
    with pytest.raises(ResourceError, match="not a Resource"):
        response.resource(0)
    assert response.resource(1).name == "a"


def test_the_number_of_resources_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_response, "RESOURCES_MAX", 3)
    assert len(scanned(b"\x12\x00" * 3)) == 3
    with pytest.raises(ResourceError, match="more than 3"):
        scanned(b"\x12\x00" * 4)
    with pytest.raises(ResourceError):
        scanned(b"\x32\x00" * 4)


def test_a_large_message_is_given_back_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_response, "RELEASED_BYTES", 100)
    encoded = pb.DeltaDiscoveryResponse(nonce="n" * 1000).SerializeToString()
    message = bytearray(encoded)
    response = DeltaResponse(message)
    response.scan(10)
    lengths = []
    while response.release():
        lengths.append(len(message))
    assert lengths == [501, 250, 125, 62]
    assert response.nonce == "n" * 1000
    assert not DeltaResponse(encoded).release()
