"""Whatever the cuts, the same frames come out, each with its own descriptor."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import PeerError
from ztunnel.workers import frames as module
from ztunnel.workers.frames import HEADER, Frame, FrameReader, pack

bodies = st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=8)


def a_descriptor() -> int:
    return os.memfd_create("frames")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@given(bodies, st.data())
def test_cut_anywhere_the_same_frames_come_out(
    sent: list[tuple[bytes, bool]], data: st.DataObject
) -> None:
    reader = FrameReader()
    stream = bytearray()
    fds_at: dict[int, int] = {}  # where in the stream a descriptor goes along
    for body, has_fd in sent:
        if has_fd:
            fds_at[len(stream)] = a_descriptor()
        stream += pack(body, has_fd=has_fd)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    edges = sorted({0, *cuts, len(stream)})
    found: list[Frame] = []
    for start, end in pairwise(edges):
        with_it = [fd for at, fd in fds_at.items() if start <= at < end]
        found += reader.receive(bytes(stream[start:end]), with_it)
    try:
        assert [(frame.body, frame.fd is not None) for frame in found] == sent
        assert [frame.fd for frame in found if frame.fd is not None] == list(fds_at.values())
    finally:
        for fd in fds_at.values():
            os.close(fd)


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(noise: bytes) -> None:
    reader = FrameReader(most=64)
    try:
        frames = reader.receive(noise)
    except PeerError:
        return
    assert all(len(frame.body) <= 64 for frame in frames)


def test_a_long_body_is_refused_before_it_arrives() -> None:
    with pytest.raises(PeerError, match="11 bytes; 10 are the most"):
        FrameReader(most=10).receive(HEADER.pack(11, False))


def test_what_the_other_end_would_refuse_is_not_sent(monkeypatch) -> None:
    monkeypatch.setattr(module, "BODY_BYTES_MAX", 3)
    assert pack(b"abc").endswith(b"abc")
    with pytest.raises(ValueError, match="4 bytes"):
        pack(b"abcd")


def test_a_message_without_its_descriptor_closes_those_of_its_neighbours() -> None:
    fd = a_descriptor()
    reader = FrameReader()
    with pytest.raises(PeerError, match="lacks its descriptor"):
        reader.receive(pack(b"one", has_fd=True) + pack(b"two", has_fd=True), [fd])
    assert not is_open(fd)


def test_descriptors_nobody_claims_are_refused_and_closed() -> None:
    fds = [a_descriptor() for _ in range(module.DESCRIPTORS_MAX + 1)]
    with pytest.raises(PeerError, match="belong to no message"):
        FrameReader().receive(b"", fds)
    assert not any(is_open(fd) for fd in fds)


def test_closing_closes_what_waits_for_its_frame() -> None:
    fd = a_descriptor()
    reader = FrameReader()
    assert reader.receive(pack(b"body", has_fd=True)[:3], [fd]) == []
    reader.close()
    assert not is_open(fd)
