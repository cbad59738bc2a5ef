"""Conversations between our end and h2's, in both roles: what one says, the other hears."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from tests.support.h2_oracle import CONNECT_HEADERS, Oracle, Ours, cut

End = Ours | Oracle


@dataclass(slots=True)
class Said:
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False


@dataclass(slots=True)
class Conversation:
    """Two ends, and what each said on each stream (0 is the client)."""

    ends: tuple[End, End]
    said: tuple[dict[int, Said], dict[int, Said]] = field(default_factory=lambda: ({}, {}))
    window: int = 65_535
    answered: set[int] = field(default_factory=set)
    cut_short: set[int] = field(default_factory=set)
    pings: tuple[list[bytes], list[bytes]] = field(default_factory=lambda: ([], []))

    def carry(self, cuts: list[int]) -> None:
        for who in (0, 1):
            for piece in cut(self.ends[who].take(), cuts):
                self.ends[1 - who].receive(piece)

    def settle(self) -> None:
        for _ in range(4):
            self.carry([])
        assert not self.ends[0].take()
        assert not self.ends[1].take()

    def open(self) -> None:
        if self.ends[0].told_to_go or len(self.said[0]) >= 20:
            return
        headers = [*CONNECT_HEADERS, (b"traceparent", b"%d" % len(self.said[0]))]
        self.said[0][self.ends[0].open(headers)] = Said(headers)

    def pick(self, who: int, index: int) -> int | None:
        """Choose a stream on which this end may speak."""
        end = self.ends[who]
        live = [each for each in end.heard if end.is_live(each)]
        if who == 1:
            live = [each for each in live if each in self.answered]
        return live[index % len(live)] if live else None

    def answer(self, index: int, status: int) -> None:
        server = self.ends[1]
        waiting = [e for e in server.heard if e not in self.answered and server.is_live(e)]
        if not waiting:
            return
        stream = waiting[index % len(waiting)]
        self.answered.add(stream)
        said = self.said[1][stream] = Said([(b":status", b"%d" % status)])
        if status == 200:
            server.respond(stream, status)
        else:
            server.refuse(stream, status)
            said.ended = True
            self.cut_short.add(stream)

    def send(self, who: int, index: int, size: int) -> None:
        stream = self.pick(who, index)
        if stream is None or self.ends[who].has_finished(stream):
            return
        payload = bytes([len(self.said[who][stream].body) % 251]) * min(
            size, self.ends[who].room(stream)
        )
        if payload:
            self.ends[who].send(stream, payload)
            self.said[who][stream].body += payload

    def finish(self, who: int, index: int) -> None:
        stream = self.pick(who, index)
        if stream is not None and not self.ends[who].has_finished(stream):
            self.ends[who].finish(stream)
            self.said[who][stream].ended = True

    def reset(self, who: int, index: int, code: int) -> None:
        stream = self.pick(who, index)
        if stream is not None:
            self.ends[who].reset(stream, code)
            self.cut_short.add(stream)

    def ping(self, who: int, number: int) -> None:
        payload = number.to_bytes(8, "big")
        self.ends[who].ping(payload)
        self.pings[who].append(payload)

    def resize(self, size: int) -> None:
        # h2 breaks when its own window shrinks below what is already on its way to it.
        if size <= self.window:
            return
        self.window = size
        for end in self.ends:
            if isinstance(end, Oracle):
                end.resize_windows(size)

    def check(self) -> None:
        self.settle()
        for who in (0, 1):
            listener = self.ends[1 - who]
            assert self.pings[who] == self.ends[who].pings
            for stream, said in self.said[who].items():
                heard = listener.heard[stream]
                if stream in self.cut_short:
                    assert said.body.startswith(heard.body)
                else:
                    assert heard.headers == said.headers
                    assert heard.body == said.body
                    assert heard.ended == said.ended
                    assert heard.reset is None
        self.check_windows()

    def check_windows(self) -> None:
        both = [{e for e in end.heard if end.is_live(e)} for end in self.ends]
        assert both[0] == both[1]
        streams = sorted(e for e in both[0] if not self.half_closed(e))
        for who in (0, 1):
            sender, receiver = self.ends[who], self.ends[1 - who]
            assert sender.send_views(streams) == receiver.receive_views(streams)

    def half_closed(self, stream: int) -> bool:
        return any(end.has_finished(stream) for end in self.ends)


def ends_of(our_role: str) -> tuple[End, End]:
    if our_role == "client":
        return Ours(client=True), Oracle(client=False)
    return Oracle(client=True), Ours(client=False)


who = st.integers(0, 1)
index = st.integers(0, 30)
step = st.one_of(
    st.tuples(st.just("open")),
    st.tuples(st.just("open")),
    st.tuples(st.just("answer"), index, st.sampled_from([200, 200, 200, 401, 503])),
    st.tuples(
        st.just("send"), who, index, st.sampled_from([1, 100, 5_000, 16_384, 40_000, 300_000])
    ),
    st.tuples(st.just("send"), who, index, st.integers(1, 70_000)),
    st.tuples(st.just("finish"), who, index),
    st.tuples(st.just("reset"), who, index, st.sampled_from([0, 2, 8])),
    st.tuples(st.just("ping"), who, st.integers(0, 2**64 - 1)),
    st.tuples(st.just("resize"), st.sampled_from([65_536, 100_000, 2**20, 2**23])),
    st.tuples(st.just("carry"), st.lists(st.integers(0, 400_000), max_size=8)),
    st.tuples(st.just("carry"), st.just([])),
)


@pytest.mark.parametrize("role", ["client", "server"])
@settings(max_examples=120)
@given(script=st.lists(step, min_size=30, max_size=90))
def test_what_one_end_says_the_other_hears(script: list[tuple], role: str):
    conversation = Conversation(ends_of(role))
    conversation.settle()
    for name, *arguments in script:
        getattr(conversation, name)(*arguments)
    conversation.check()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("who_leaves", [0, 1])
def test_streams_outlive_a_goaway_of_either_end(role: str, who_leaves: int):
    talk = Conversation(ends_of(role))
    talk.settle()
    talk.open()
    talk.carry([])
    talk.answer(0, 200)
    talk.settle()
    talk.ends[who_leaves].goaway()
    talk.settle()
    assert talk.ends[1 - who_leaves].told_to_go
    for speaker in (0, 1):
        talk.send(speaker, 0, 100_000)
    talk.settle()
    for speaker in (0, 1):
        talk.finish(speaker, 0)
    talk.check()
    assert all(not end.is_live(1) for end in talk.ends)
