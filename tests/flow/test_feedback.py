"""What a pod's connections show about endpoints steers the choice among them."""

from __future__ import annotations

import pytest
import trio

from tests.support.builders import a_workload
from tests.support.flow import Pair, a_pair, loopback_address
from tests.support.peers import echo, echo_and_check, read_exactly, serve
from ztunnel.model.settings import Balancing
from ztunnel.model.workload import TunnelProtocol, Workload

CALLS = 30


def beside(pair: Pair, ip: str) -> Workload:
    """Put a second endpoint of the service into the mesh; whether anybody is there is open."""
    first = pair.server_workload
    second = a_workload(
        "second",
        ns="shop",
        sa="cart",
        ips=[ip],
        protocol=first.protocol,
        services=first.services,
    )
    pair.mesh.put(second)
    return second


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_an_endpoint_that_cannot_be_reached_is_left_alone(protocol: TunnelProtocol) -> None:
    async with a_pair(protocol=protocol) as pair:
        pair.serve(echo)
        dead = loopback_address()
        beside(pair, dead)
        failed = 0
        for number in range(CALLS):
            try:
                await echo_and_check(pair.call, streams=1, size=100, seed=number)
            except* (trio.BrokenResourceError, EOFError):
                failed += 1
        # A tunnel is dialled again elsewhere at once; for a plain connection it is too late.
        assert failed <= (0 if protocol is TunnelProtocol.HBONE else 1)
        outliers = pair.client.context.feedback.outliers
        assert bool(outliers) or failed == 0


async def test_least_connections_spreads_evenly() -> None:
    async with a_pair(balancing=Balancing.LEAST_CONNECTIONS) as pair:
        pair.serve(echo)
        ip = loopback_address()
        second = beside(pair, ip)
        await pair.mesh.add_proxy(second)
        [listener] = await trio.open_tcp_listeners(pair.app_address[1], host=ip)
        pair.mesh.nursery.start_soon(serve, echo, listener)
        feedback = pair.client.context.feedback
        streams = []
        for _ in range(CALLS):
            stream = await pair.call()
            await stream.send_all(b"x")
            assert await read_exactly(stream, 1) == b"x"
            streams.append(stream)
        assert feedback.live(second) == feedback.live(pair.server_workload) == CALLS // 2
        for stream in streams:
            await stream.aclose()
        await pair.lines.wait_for_ends(2 * CALLS)
        assert feedback.live(second) == feedback.live(pair.server_workload) == 0
