from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.namespaces import needs_root
from tests.support.tunnels import open_descriptors
from ztunnel.linux import conntrack
from ztunnel.linux.conntrack import Conntrack
from ztunnel.linux.netlink import HEADER, NLMSG_ERROR
from ztunnel.model.network import Endpoint

LOCAL = {4: Endpoint.parse("127.0.0.1:15053"), 6: Endpoint.parse("[::1]:15053")}
CLIENT = {4: Endpoint.parse("10.1.0.1:40000"), 6: Endpoint.parse("[fd00::1]:40000")}
RESOLVER = {4: Endpoint.parse("10.96.0.10:53"), 6: Endpoint.parse("[fd00::10]:53")}
FOUND = 1 << 8


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def a_flow(source: Endpoint, target: Endpoint) -> bytes:
    first = 1 if source.ip.version == 4 else 3
    ips = attribute(first, source.ip.packed) + attribute(first + 1, target.ip.packed)
    ports = (
        attribute(1, b"\x11")
        + attribute(2, source.port.to_bytes(2, "big"))
        + attribute(3, target.port.to_bytes(2, "big"))
    )
    return attribute(0x8001, ips) + attribute(0x8002, ports)


# An address of three bytes.
SHORT = b"\2\0\0\0" + attribute(0x8001, attribute(0x8001, attribute(2, b"\1\2\3")))


class Kernel:
    """The other end of the socket, which answers what it is told to."""

    def __init__(self, table: Conntrack) -> None:
        ours, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.settimeout(0)
        table._sock.close()
        table._sock = ours

    def answer(self, kind: int, body: bytes, sequence: int = 1) -> None:
        self.end.send(HEADER.pack(HEADER.size + len(body), kind, 0, sequence, 0) + body)


@pytest.fixture
def table() -> Iterator[Conntrack]:
    table = Conntrack()
    yield table
    table.close()


@pytest.fixture
def kernel(table: Conntrack) -> Iterator[Kernel]:
    kernel = Kernel(table)
    yield kernel
    kernel.end.close()


@pytest.mark.parametrize("family", [4, 6])
def test_the_kernel_is_asked_for_the_flow_by_its_answers(
    table: Conntrack, kernel: Kernel, family: int
) -> None:
    flow = attribute(0x8001, a_flow(CLIENT[family], RESOLVER[family]))
    kernel.answer(FOUND, b"\2\0\0\0" + flow + attribute(0x8002, b""))
    found = table.original_destination(client=CLIENT[family], local=LOCAL[family])
    assert found == RESOLVER[family]
    asked = kernel.end.recv(1000)
    length, kind, _, sequence, _ = HEADER.unpack_from(asked)
    assert (length, kind, sequence) == (len(asked), 0x101, 1)
    assert asked[HEADER.size + 4 :] == attribute(0x8002, a_flow(LOCAL[family], CLIENT[family]))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("first", [b"", attribute(99, b"new")])
def test_the_order_in_which_the_kernel_tells_does_not_matter(
    table: Conntrack, kernel: Kernel, family: int, first: bytes
) -> None:
    flow = a_flow(CLIENT[family], RESOLVER[family])
    at = struct.unpack_from("=H", flow)[0]
    turned = attribute(0x8001, first + flow[at:] + flow[:at])
    kernel.answer(FOUND, bytes([2 if family == 4 else 10, 0, 0, 0]) + turned)
    assert (
        table.original_destination(client=CLIENT[family], local=LOCAL[family]) == RESOLVER[family]
    )


@pytest.mark.parametrize("family", [4, 6])
def test_the_usual_order_is_read_at_once(family: int) -> None:
    number = {4: 2, 6: 10}[family]
    flow = attribute(0x8001, a_flow(CLIENT[family], RESOLVER[family]))
    layout = conntrack._FAMILY_V4 if family == 4 else conntrack._FAMILY_V6
    found = layout.destination(bytes([number, 0, 0, 0]) + flow + attribute(0x8002, b""))
    resolver = RESOLVER[family]
    assert found == (resolver.ip.packed, resolver.port.to_bytes(2, "big"))


def test_an_answer_to_an_older_question_is_passed_over(table: Conntrack, kernel: Kernel) -> None:
    stale = attribute(0x8001, a_flow(CLIENT[4], LOCAL[4]))
    kernel.answer(FOUND, bytes(4) + stale, sequence=0)
    kernel.answer(FOUND, bytes(4) + attribute(0x8001, a_flow(CLIENT[4], RESOLVER[4])))
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) == RESOLVER[4]


@pytest.mark.parametrize("number", [errno.ENOENT, 0])
def test_no_flow_is_no_error(table: Conntrack, kernel: Kernel, number: int) -> None:
    kernel.answer(NLMSG_ERROR, struct.pack("=i", -number))
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) is None


def test_a_refusal_is_an_error(table: Conntrack, kernel: Kernel) -> None:
    kernel.answer(NLMSG_ERROR, struct.pack("=i", -errno.EPERM))
    with pytest.raises(PermissionError):
        table.original_destination(client=CLIENT[4], local=LOCAL[4])


def test_a_silent_kernel_is_not_waited_for(table: Conntrack, kernel: Kernel) -> None:
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) is None


@pytest.mark.parametrize(
    "body", [b"", b"\2\0\0\0", b"\2\0\0\0\1\0\1\x80", b"\2\0\0\0" + bytes(8), SHORT]
)
def test_a_flow_without_a_destination_is_none(
    table: Conntrack, kernel: Kernel, body: bytes
) -> None:
    kernel.answer(FOUND, body)
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) is None


def test_a_table_that_cannot_be_opened_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(conntrack.socket, "socket", Refusing)
    before = open_descriptors()
    with pytest.raises(OSError, match="no memory"):
        Conntrack()
    assert open_descriptors() == before


def test_other_kinds_of_answers_are_passed_over(table: Conntrack, kernel: Kernel) -> None:
    kernel.answer(3, b"")
    kernel.answer(FOUND, bytes(4) + attribute(0x8001, a_flow(CLIENT[4], RESOLVER[4])))
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) == RESOLVER[4]


@needs_root
def test_the_real_kernel_knows_no_such_flow(table: Conntrack) -> None:
    assert table.original_destination(client=CLIENT[4], local=LOCAL[4]) is None
