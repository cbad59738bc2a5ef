from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, strategies as st

from ztunnel.wire.held_versions import HeldVersions, mark_of
from ztunnel.wire.pb import xds_pb2 as pb

A_TEXT = st.text(max_size=300)


def told(held: HeldVersions, *wanted: str) -> Mapping[str, str]:
    """What protobuf's own decoder makes of it."""
    data = b"".join(held.told(wanted))
    return dict(pb.DeltaDiscoveryRequest.FromString(data).initial_resource_versions)


@given(versions=st.dictionaries(A_TEXT, A_TEXT), gone=st.sets(A_TEXT))
def test_protobuf_reads_what_is_held_whatever_the_names(
    versions: dict[str, str], gone: set[str]
) -> None:
    held = HeldVersions()
    for name, version in versions.items():
        held.put(name, mark_of(name, version, b""))
    for name in gone:
        held.remove(name)
    left = {name: version for name, version in versions.items() if name not in gone}
    assert told(held) == left
    assert len(held) == len(left)


@pytest.mark.parametrize("length", [1, 127, 128, 16_383, 16_384, 100_000])
def test_protobuf_reads_names_of_any_length(length: int) -> None:
    held = HeldVersions()
    held.put("n" * length, mark_of("n" * length, "v" * length, b""))
    assert told(held) == {"n" * length: "v" * length}


@pytest.mark.parametrize(
    ("version", "value", "is_held"),
    [("v1", b"other", True), ("v2", b"value", False), ("", b"value", False)],
)
def test_a_version_is_what_counts_if_there_is_one(
    version: str, value: bytes, is_held: bool
) -> None:
    held = HeldVersions()
    held.put("a", mark_of("a", "v1", b"value"))
    assert held.holds("a", mark_of("a", version, value)) is is_held


@pytest.mark.parametrize(
    ("version", "value", "is_held"),
    [("", b"value", True), ("", b"other", False), ("v1", b"value", False)],
)
def test_the_bytes_are_what_counts_without_a_version(
    version: str, value: bytes, is_held: bool
) -> None:
    held = HeldVersions()
    held.put("a", mark_of("a", "", b"value"))
    assert held.holds("a", mark_of("a", version, value)) is is_held
    assert told(held) == {"a": ""}


@pytest.mark.parametrize("versions", [("v1", ""), ("", "v1"), ("v1", "v2")])
def test_the_latest_of_a_name_takes_the_place_of_the_one_before(versions: tuple[str, str]) -> None:
    held = HeldVersions()
    for version in versions:
        held.put("a", mark_of("a", version, b""))
    assert told(held) == {"a": versions[-1]}
    assert len(held) == 1
    held.remove("a")
    assert "a" not in held


def test_what_is_wanted_is_told_without_a_version_unless_it_is_held() -> None:
    held = HeldVersions()
    held.put("a", mark_of("a", "v1", b""))
    assert told(held, "a", "b") == {"a": "v1", "b": ""}


def test_nothing_is_held_under_an_unknown_name() -> None:
    assert not HeldVersions().holds("a", mark_of("a", "", b""))


def test_many_are_told_piece_by_piece() -> None:
    held = HeldVersions()
    for number in range(3500):
        held.put(f"{number}", mark_of(f"{number}", "v", b""))
    assert max(len(piece) for piece in held.told()) < 3500
    assert len(told(held)) == 3500
