from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.flow import Mesh, a_mesh
from ztunnel.errors import DeniedError, ZtunnelError
from ztunnel.model.network import Endpoint
from ztunnel.proxy.connection import Connection
from ztunnel.proxy.context import ProxyContext
from ztunnel.proxy.labels import Description
from ztunnel.telemetry.access_log import Direction, Ends, Record
from ztunnel.telemetry.traffic import NOBODY, Labels, Reporter
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.zds import PodInfo

SOURCE = Endpoint.parse("192.0.2.1:40000")


class Call(Connection):
    """A connection of which the test says what moved."""

    __slots__ = ("released", "tally")

    def __init__(self, mesh: Mesh, nursery: trio.Nursery | None = None) -> None:
        context = ProxyContext(
            node=mesh.node,
            info=PodInfo("cart-0", "shop", "cart"),  # type: ignore[arg-type]
            sockets=SocketFactory(netns=None, mark=None, keepalive=None),
            spawn=(nursery or mesh.nursery).start_soon,
        )
        record = Record(
            log=mesh.node.access_log,
            direction=Direction.OUTBOUND,
            source=SOURCE,
            started=trio.current_time(),
        )
        super().__init__(context, SOURCE, record)
        self.released: list[ZtunnelError | None] = []
        self.tally = (0, 0)

    def moved(self) -> tuple[int, int]:
        return self.tally

    def release(self, error: ZtunnelError | None) -> None:
        self.released.append(error)

    def open_books(self) -> None:
        labels = Labels(Reporter.SOURCE, NOBODY, NOBODY)
        self.opened(Description(Ends(), labels))


def metric(mesh: Mesh, name: str) -> str:
    """Give the value of the only series of a traffic metric."""
    found = [
        line for line in mesh.node.metrics.traffic.text() for line in line.splitlines()
        if line.startswith(f"{name}_total{{")
    ]  # fmt: skip
    [line] = found
    return line.rpartition(" ")[2]


async def test_it_ends_once_whatever_is_said_later() -> None:
    async with a_mesh() as mesh:
        call = Call(mesh)
        call.open_books()
        call.end(None)
        call.end(DeniedError("too late"))
        assert call.released == [None]
        [line] = await mesh.lines.wait_for_ends(1)
        assert line["level"] == "info"


async def test_bytes_are_counted_once_however_often_they_are_looked_at() -> None:
    async with a_mesh() as mesh:
        call = Call(mesh)
        call.open_books()
        call.tally = (10, 100)
        call.count()
        call.count()
        call.tally = (15, 200)
        call.end(None)
        assert metric(mesh, "istio_tcp_received_bytes") == "15"
        assert metric(mesh, "istio_tcp_sent_bytes") == "200"
        assert mesh.lines.ended()[0].bytes == (15, 200)


async def test_what_ends_before_it_is_known_is_in_no_traffic_metric() -> None:
    async with a_mesh() as mesh:
        call = Call(mesh)
        call.count()
        call.end(DeniedError("no"))
        assert list(mesh.node.metrics.traffic.text()) == []
        assert mesh.lines.ended()[0]["message"] == "connection failed"


async def raises(error: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise error


@pytest.mark.parametrize(
    ("error", "text", "reason"),
    [
        (DeniedError("no"), "no", "denied"),
        (OSError(113, "No route to host"), "io error: No route to host", "unreachable"),
    ],
)
async def test_work_that_fails_ends_the_connection(
    error: Exception, text: str, reason: str
) -> None:
    async with a_mesh() as mesh:
        call = Call(mesh)
        call.wait_for(lambda: raises(error))
        [line] = await mesh.lines.wait_for_ends(1)
        assert (line["error"], line["reason"]) == (text, reason)


async def test_a_bug_in_the_work_ends_this_connection_only_and_is_logged() -> None:
    async with a_mesh() as mesh:
        call = Call(mesh)
        call.wait_for(lambda: raises(RuntimeError("a bug")))
        [line] = await mesh.lines.wait_for_ends(1)
        assert (line["error"], line["reason"]) == ("internal error: a bug", "internal")
        assert mesh.lines.take_bugs() == 1


async def test_work_that_is_cancelled_ends_the_connection_as_drained() -> None:
    async with a_mesh() as mesh:
        async with trio.open_nursery() as nursery:
            call = Call(mesh, nursery)
            call.wait_for(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        [line] = await mesh.lines.wait_for_ends(1)
        assert line["error"] == "connection closed due to connection drain"


async def test_a_connection_that_ends_is_forgotten_and_dials_no_more() -> None:
    class Dialling:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    async with a_mesh() as mesh:
        call = Call(mesh)
        live, dial = call.context.live, Dialling()
        live.outbound[call] = None
        call._dial = dial  # type: ignore[assignment]
        Connection.release(call, None)
        assert len(live) == 0
        assert dial.cancelled
