from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.flow import Pair, a_pair, connect, expect_abort
from tests.support.peers import echo, read_exactly, read_to_end
from ztunnel.model.network import Endpoint
from ztunnel.proxy import plaintext
from ztunnel.telemetry.traffic import Reporter


@pytest.fixture
def going_to(monkeypatch):
    """Do what the packet filter does: tell the listener where the caller meant to go."""

    def set_destination(where: str) -> None:
        monkeypatch.setattr(plaintext, "original_destination", lambda _: Endpoint.parse(where))

    return set_destination


def app_of(pair: Pair) -> str:
    host, port = pair.app_address
    return f"{host}:{port}"


async def test_plaintext_is_passed_on_to_where_it_meant_to_go(going_to) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        going_to(app_of(pair))
        async with connect(pair.plaintext) as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
            [live] = pair.server.context.live.inbound
            assert (live.protocol, live.original, str(live.actual)) == ("TCP", None, app_of(pair))
            assert pair.mesh.node.metrics.sockets_open(Reporter.DESTINATION).value == 1
            await stream.send_eof()
            assert await read_to_end(stream) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert (line["level"], line["direction"], line.bytes) == ("info", "inbound", (5, 5))
        assert line["dst.addr"] == app_of(pair)
        assert "src.identity" not in line
        assert line["dst.service"] == "cart.shop.svc.cluster.local"
        assert pair.mesh.node.metrics.sockets_open(Reporter.DESTINATION).value == 0


@pytest.mark.parametrize("port", [15001, 15006, 15008])
async def test_a_call_to_our_own_ports_is_dropped_early(port: int, going_to) -> None:
    async with a_pair() as pair:
        going_to(f"{pair.app_address[0]}:{port}")
        async with connect(pair.plaintext) as stream:
            assert await expect_abort(stream) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert (line["message"], line["level"]) == ("connection failed", "warn")
        assert line["error"] == "attempted recursive call to ourselves"


async def test_an_application_that_is_down_is_an_abort_and_a_full_line(going_to) -> None:
    async with a_pair() as pair:
        going_to(app_of(pair))
        await pair.app.aclose()
        async with connect(pair.plaintext) as stream:
            assert await expect_abort(stream) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert line["message"] == "connection complete"
        assert line["error"].startswith("connection failed: Connection refused")


async def test_one_connection_too_many_is_reset(going_to) -> None:
    async with a_pair(max_connections_per_pod=1) as pair:
        pair.serve(echo)
        going_to(app_of(pair))
        async with connect(pair.plaintext) as stream, connect(pair.plaintext) as refused:
            assert await expect_abort(refused) == b""
            await stream.send_eof()
            assert await read_to_end(stream) == b""
        ends = await pair.lines.wait_for_ends(2)
        assert ends[0]["reason"] == "limit"
        assert ends[0]["direction"] == "inbound"


async def test_a_pod_that_goes_away_while_we_dial_ends_the_connection(going_to) -> None:
    async with a_pair() as pair:
        going_to(app_of(pair))
        pair.app.socket.listen(0)
        with connect(pair.app_address).socket, connect(pair.plaintext).socket as caller:
            await trio.testing.wait_all_tasks_blocked()
            pair.mesh.running[pair.server].cancel()
            assert await expect_abort(trio.SocketStream(caller)) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert line["reason"] == "drain"
