from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, strategies as st
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from ztunnel.linux import netlink
from ztunnel.linux.netlink import NLM_F_ACK, NLM_F_DUMP, NetlinkSocket, attributes_in, messages_in

ROUTE = 0
GET_LINK = 18  # RTM_GETLINK: asking changes nothing and needs no privilege
NO_SUCH_INDEX = 0x7FFF_FFF0


def get_link(index: int, *, flags: int, sequence: int = 1) -> bytes:
    message = ifinfmsg()
    message["index"] = index
    return netlink.encode(message, kind=GET_LINK, flags=flags, sequence=sequence)


def test_a_dump_lists_the_interfaces() -> None:
    with NetlinkSocket(ROUTE) as sock:
        bodies = sock.dump(get_link(0, flags=NLM_F_DUMP))
    indexes = [struct.unpack_from("=BxHi", body)[2] for body in bodies]
    assert 1 in indexes


def test_each_refusal_is_told_apart_by_its_sequence_number() -> None:
    batch = b"".join(
        get_link(index, flags=NLM_F_ACK, sequence=sequence)
        for sequence, index in enumerate([1, NO_SUCH_INDEX, 1, NO_SUCH_INDEX], 1)
    )
    with NetlinkSocket(ROUTE) as sock:
        failures = sock.exchange(batch, acks=4)
        assert [(item.sequence, item.number) for item in failures] == [
            (2, errno.ENODEV),
            (4, errno.ENODEV),
        ]
        assert sock.exchange(get_link(1, flags=NLM_F_ACK), acks=1) == []


def test_the_kernels_own_words_are_passed_on() -> None:
    message = ifinfmsg()
    message["attrs"] = [("IFLA_IFNAME", "longer-than-any-interface-name")]
    request = netlink.encode(message, kind=GET_LINK, flags=NLM_F_ACK, sequence=1)
    with NetlinkSocket(ROUTE) as sock:
        failures = sock.exchange(request, acks=1)
    assert "(Attribute failed policy validation)" in failures[0].text


def test_a_missing_answer_is_an_error() -> None:
    with NetlinkSocket(ROUTE) as sock, pytest.raises(OSError, match="answered 1 of 2"):
        sock.exchange(get_link(1, flags=NLM_F_ACK), acks=2)


def test_a_refused_dump_is_an_error() -> None:
    request = bytearray(get_link(0, flags=NLM_F_DUMP))
    struct.pack_into("=H", request, 4, 0x7FFF)  # no such kind of message
    with NetlinkSocket(ROUTE) as sock, pytest.raises(OSError, match="not supported"):
        sock.dump(bytes(request))


def test_an_unknown_family_cannot_be_opened() -> None:
    with pytest.raises(OSError, match="not supported"):
        NetlinkSocket(31)


def test_closing_twice_is_fine() -> None:
    with NetlinkSocket(ROUTE) as sock:
        sock.close()


@given(st.lists(st.tuples(st.integers(16, 40), st.binary(max_size=40)), max_size=5))
def test_messages_are_split_where_they_were_joined(wanted: list[tuple[int, bytes]]) -> None:
    chunk = b""
    for kind, body in wanted:
        length = netlink.HEADER.size + len(body)
        chunk += netlink.HEADER.pack(length, kind, 0, 0, 0) + body + bytes(-length % 4)
    assert [(kind, body) for kind, _, _, body in messages_in(chunk)] == wanted


@given(st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=40)), max_size=5))
def test_attributes_are_split_where_they_were_joined(wanted: list[tuple[int, bytes]]) -> None:
    data = b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in wanted
    )
    assert list(attributes_in(data)) == wanted


@given(st.binary(max_size=200))
def test_any_bytes_are_split_without_an_error(chunk: bytes) -> None:
    assert sum(16 for _ in messages_in(chunk)) <= len(chunk)


@given(st.binary(min_size=24, max_size=120))
def test_any_explanation_is_read_without_an_error(body: bytes) -> None:
    assert netlink._explain(errno.EINVAL, 0x200, body).startswith("Invalid argument")
