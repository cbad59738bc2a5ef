"""SOCKS5 on the pod's loopback: success is said when there is a connection, and not before."""

from __future__ import annotations

import pytest
import trio

from tests.support.flow import Pair, a_pair, address_of, connect, expect_abort, loopback_address
from tests.support.peers import echo, read_exactly, read_to_end
from ztunnel.errors import LimitError
from ztunnel.model.network import Endpoint
from ztunnel.proxy import socks

GREETING = b"\x05\x01\x00"
OK = bytes.fromhex("05000001000000000000")


def failure(code: int) -> bytes:
    return bytes((5, code)) + OK[2:]


def to_address(pair: Pair) -> bytes:
    host, port = pair.app_address
    return b"\x05\x01\x00\x01" + bytes(map(int, host.split("."))) + port.to_bytes(2, "big")


def to_name(name: str, port: int) -> bytes:
    return b"\x05\x01\x00\x03" + bytes((len(name),)) + name.encode() + port.to_bytes(2, "big")


async def greeted(pair: Pair) -> trio.SocketStream:
    stream = connect(address_of(pair.client, "socks5"))
    await stream.send_all(GREETING)
    assert await read_exactly(stream, 2) == b"\x05\x00"
    return stream


async def test_a_pod_is_reached_by_its_address_through_a_tunnel() -> None:
    async with a_pair(socks5_enabled=True) as pair:
        pair.serve(echo)
        async with await greeted(pair) as stream:
            await stream.send_all(to_address(pair))
            assert await read_exactly(stream, 10) == OK
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert await read_to_end(stream) == b"hello"
        outbound, inbound = await pair.ends()
        assert outbound["dst.hbone_addr"] == inbound["dst.hbone_addr"]
        assert outbound.bytes == (5, 5)


async def test_a_service_is_reached_by_its_name() -> None:
    names = {"dns_enabled": True, "dns_addresses": (Endpoint.parse(f"{loopback_address()}:0"),)}
    async with a_pair(socks5_enabled=True, **names) as pair:
        pair.serve(echo)
        async with await greeted(pair) as stream:
            await stream.send_all(to_name("cart.shop.svc.cluster.local", pair.vip[1]))
            assert await read_exactly(stream, 10) == OK
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert await read_to_end(stream) == b"hello"
        outbound, _ = await pair.ends()
        assert outbound["dst.service"] == "cart.shop.svc.cluster.local"


async def test_a_conversation_that_is_cut_leaves_nobody_waiting_for_its_socket() -> None:
    async with a_pair(socks5_enabled=True) as pair:
        pair.serve(echo)
        live = pair.client.context.live
        first = await greeted(pair)
        [connection] = live.outbound
        connection.cut(LimitError("connection idle for 1s"))
        await expect_abort(first)
        second = await greeted(pair)  # one of its sockets gets the number that has become free
        await second.send_all(to_address(pair))
        assert await read_exactly(second, 10) == OK
        await first.aclose()
        await second.aclose()
        await pair.lines.wait_for_ends(3)


async def test_success_is_not_said_when_nobody_answers() -> None:
    async with a_pair(socks5_enabled=True) as pair:
        request = to_address(pair)
        await pair.app.aclose()
        async with await greeted(pair) as stream:
            await stream.send_all(request)
            assert await read_to_end(stream) == failure(5)
        outbound, inbound = await pair.ends()
        assert outbound["reason"] == "remote_unreachable"
        assert "Connection refused" in inbound["error"]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        pytest.param(b"\x04\x01", failure(7), id="SOCKS4"),
        pytest.param(GREETING + b"\x05\x02\x00\x01", b"\x05\x00" + failure(7), id="BIND"),
        pytest.param(b"\x05\x01\x02", b"\x05\xff", id="only with a password"),
    ],
)
async def test_a_client_that_breaks_the_protocol_is_told_and_left(
    sent: bytes, answer: bytes
) -> None:
    async with a_pair(socks5_enabled=True) as pair:
        async with connect(address_of(pair.client, "socks5")) as stream:
            await stream.send_all(sent)
            assert (await read_some_and_end(stream)).startswith(answer)
        (ended,) = await pair.lines.wait_for_ends(1)
        assert ended["message"] == "connection failed"


async def read_some_and_end(stream: trio.SocketStream) -> bytes:
    content = b""
    with trio.fail_after(10):
        try:
            while data := await stream.receive_some():
                content += data
        except trio.BrokenResourceError:
            pass
    return content


async def test_a_client_that_never_asks_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socks, "HANDSHAKE_SECONDS", 0.05)
    async with a_pair(socks5_enabled=True) as pair:
        async with connect(address_of(pair.client, "socks5")) as stream:
            await read_some_and_end(stream)
        (ended,) = await pair.lines.wait_for_ends(1)
        assert "SOCKS5 handshake not finished within 0.05s" in ended["error"]


async def test_there_is_no_socks_door_unless_asked_for() -> None:
    async with a_pair() as pair:
        assert "socks5" not in pair.client.addresses
