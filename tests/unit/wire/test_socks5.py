from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import PeerError
from ztunnel.model.network import Endpoint, HostPort, Port
from ztunnel.wire.socks5 import Reply, Socks5Server, reply

GREETING = b"\x05\x01\x00"
TO_V4 = b"\x05\x01\x00\x01\xc0\x00\x02\x0a\x00\x50"
TO_V6 = b"\x05\x01\x00\x04" + bytes.fromhex("20010db8" + "0" * 23 + "7") + b"\x1f\x90"
TO_MAPPED = b"\x05\x01\x00\x04" + bytes(10) + b"\xff\xff\xc0\x00\x02\x0a\x00\x50"
TO_NAME = b"\x05\x01\x00\x03\x04cart\x00\x50"


@pytest.mark.parametrize(
    ("request_bytes", "target"),
    [
        pytest.param(TO_V4, Endpoint.parse("192.0.2.10:80"), id="IPv4"),
        pytest.param(TO_V6, Endpoint.parse("[2001:db8::7]:8080"), id="IPv6"),
        pytest.param(TO_MAPPED, Endpoint.parse("192.0.2.10:80"), id="mapped IPv4"),
        pytest.param(TO_NAME, HostPort("cart", Port(80)), id="a name"),
    ],
)
@given(data=st.data())
def test_a_request_is_understood_however_it_is_cut(request_bytes, target, data) -> None:
    wire = GREETING + request_bytes + b"early"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    server = Socks5Server()
    said = b""
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        if server.target is None:
            server.receive(wire[start:end])
        else:
            server.rest += wire[start:end]
        said += server.data_to_send()
    assert server.target == target
    assert server.rest == b"early"
    assert said == b"\x05\x00"


VIOLATION = reply(Reply.UNSUPPORTED)


@pytest.mark.parametrize(
    ("wire", "answer"),
    [
        pytest.param(b"\x04", VIOLATION, id="SOCKS4"),
        pytest.param(b"\x05\x00", VIOLATION, id="no methods"),
        pytest.param(b"\x05\x01\x02", b"\x05\xff", id="password only"),
        *(
            pytest.param(GREETING + request, b"\x05\x00" + VIOLATION, id=name)
            for name, request in {
                "BIND": b"\x05\x02\x00\x01",
                "version": b"\x04\x01\x00\x01",
                "address type": b"\x05\x01\x00\x02",
                "no name": b"\x05\x01\x00\x03\x00",
                "not UTF-8": b"\x05\x01\x00\x03\x01\xff\x00\x50",
            }.items()
        ),
    ],
)
def test_a_broken_handshake_is_answered_and_ended(wire: bytes, answer: bytes) -> None:
    server = Socks5Server()
    with pytest.raises(PeerError):
        server.receive(wire)
    assert server.data_to_send() == answer


@given(st.binary(max_size=600))
def test_arbitrary_bytes_raise_only_the_declared_error(wire: bytes) -> None:
    server = Socks5Server()
    try:
        server.receive(wire)
    except PeerError:
        assert server.target is None


def test_a_reply_has_ten_bytes() -> None:
    assert reply(Reply.SUCCEEDED) == bytes.fromhex("05000001000000000000")
    assert reply(Reply.HOST_UNREACHABLE)[1] == 4
