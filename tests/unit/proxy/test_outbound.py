from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.flow import a_pair, expect_abort
from tests.support.peers import echo, read_exactly
from ztunnel.model.network import Endpoint
from ztunnel.proxy import outbound


async def test_an_address_of_nobody_is_passed_through(monkeypatch) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        pair.mesh.put(removed_workloads=[pair.server_workload.uid])
        app = Endpoint.of(pair.app_address)
        monkeypatch.setattr(outbound, "original_destination", lambda _: app)
        async with await pair.call() as stream:
            await stream.send_all(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
            [live] = pair.client.context.live.outbound
            assert (live.protocol, live.original, live.actual) == ("TCP", str(app), app)
            await stream.send_eof()
            with trio.fail_after(5):
                [line] = await pair.lines.wait_for_ends(1)
        assert line["dst.addr"] == str(app)
        assert "dst.workload" not in line
        assert len(pair.client.pool) == 0


@pytest.mark.parametrize("port", [15001, 15006, 15008])
async def test_a_call_to_our_own_ports_on_loopback_is_dropped_early(port: int, monkeypatch) -> None:
    async with a_pair() as pair:
        target = Endpoint.parse(f"127.0.0.1:{port}")
        monkeypatch.setattr(outbound, "original_destination", lambda _: target)
        async with await pair.call() as stream:
            assert await expect_abort(stream) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert (line["message"], line["error"]) == (
            "connection failed",
            "attempted recursive call to ourselves",
        )


async def test_a_service_without_endpoints_is_no_route_and_an_early_line() -> None:
    async with a_pair() as pair:
        pair.mesh.put(removed_workloads=[pair.server_workload.uid])
        async with await pair.call() as stream:
            assert await expect_abort(stream) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert line["message"] == "connection failed"
        assert line["error"].startswith("no healthy upstream")


async def test_a_dial_that_is_refused_is_unreachable_and_the_next_call_is_told_at_once() -> None:
    async with a_pair() as pair:
        pair.mesh.running[pair.server].cancel()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            async with await pair.call() as stream:
                assert await expect_abort(stream) == b""
        ends = await pair.lines.wait_for_ends(2)
        assert {end["reason"] for end in ends} == {"unreachable"}
        assert all("Connection refused" in end["error"] for end in ends)
