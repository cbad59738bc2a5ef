"""How things end: drain, removal, limits, and what is not known or does not answer in time."""

from __future__ import annotations

import socket

import pytest
import trio
from hyperframe.frame import Frame, GoAwayFrame, PingFrame

from tests.support.builders import a_workload
from tests.support.certs import a_certificate
from tests.support.flow import (
    Pair,
    a_mesh,
    a_pair,
    abort,
    address_of,
    connect,
    expect_abort,
    loopback_address,
)
from tests.support.peers import echo, read_exactly, read_to_end
from tests.support.scripted import a_scripted_client
from ztunnel.model.workload import TunnelProtocol
from ztunnel.proxy import context
from ztunnel.telemetry.traffic import Reporter


async def a_running_call(pair: Pair) -> trio.SocketStream:
    stream = await pair.call()
    await stream.send_all(b"ping")
    assert await read_exactly(stream, 4) == b"ping"
    return stream


async def finish(stream: trio.SocketStream) -> None:
    await stream.send_eof()
    assert await read_to_end(stream) == b""
    await stream.aclose()


# Going away.


async def test_a_draining_server_lets_running_streams_finish_and_takes_no_new_ones() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        running = await a_running_call(pair)
        port = pair.hbone
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.server.drain, 10)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConnectionRefusedError):
                connect(port)
            await running.send_all(b"still here")
            assert await read_exactly(running, 10) == b"still here"
            # The client has been told to open no more streams there, so it dials, in vain.
            async with await pair.call() as refused:
                assert await expect_abort(refused) == b""
            await finish(running)
        ends = await pair.lines.wait_for_ends(3)
        assert "Connection refused" in ends[0]["error"]
        assert [end["level"] for end in ends[1:]] == ["info", "info"]


async def test_a_draining_server_says_goodbye_and_closes_idle_tunnels() -> None:
    async with a_pair() as pair:
        certificate = a_certificate(authority=pair.mesh.authority)
        async with a_scripted_client(pair.hbone, certificate) as client:
            await pair.server.drain(10)
            with trio.fail_after(10):
                frames = frames_of(await read_to_end(client.tls))
            goodbye = next(frame for frame in frames if isinstance(frame, GoAwayFrame))
            assert (goodbye.error_code, goodbye.last_stream_id) == (0, 2**31 - 1)
            assert isinstance(frames[-2], PingFrame)
            assert isinstance(frames[-1], GoAwayFrame)
            assert frames[-1].last_stream_id == 0
        await trio.testing.wait_all_tasks_blocked()
        assert len(pair.server.tunnels) == 0


def frames_of(raw: bytes) -> list[Frame]:
    frames = []
    while raw:
        frame, length = Frame.parse_frame_header(memoryview(raw[:9]))
        frame.parse_body(memoryview(raw[9 : 9 + length]))
        frames.append(frame)
        raw = raw[9 + length :]
    return frames


async def test_a_draining_client_lets_running_connections_finish() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        running = await a_running_call(pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.client.drain, 10)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConnectionRefusedError):
                connect(pair.vip)
            await finish(running)
        assert {end["level"] for end in await pair.lines.wait_for_ends(2)} == {"info"}


async def test_a_drain_waits_no_longer_than_it_may_and_cuts_what_is_left() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        streams = [await a_running_call(pair) for _ in range(3)]
        with trio.fail_after(5):
            await pair.server.drain(0.02)
        await pair.lines.wait_for("drain duration expired with pending connections")
        for stream in streams:
            assert await expect_abort(stream) == b""
            await stream.aclose()
        await pair.lines.wait_for_ends(6)
        for inbound in pair.lines.ended("inbound"):
            assert inbound["error"] == "connection closed due to connection drain"


async def test_removing_the_server_pod_cuts_everything_at_once() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        async with await a_running_call(pair) as running:
            pair.mesh.running[pair.server].cancel()
            assert await expect_abort(running) == b""
        outbound, inbound = await pair.ends()
        assert inbound["error"] == "connection closed due to connection drain"
        assert outbound["level"] == "error"
        assert outbound.bytes == inbound.bytes == (4, 4)


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_removing_the_client_pod_cuts_everything_at_once(protocol: TunnelProtocol) -> None:
    async with a_pair(protocol=protocol) as pair:
        pair.serve(echo)
        async with await a_running_call(pair) as running:
            pair.mesh.running[pair.client].cancel()
            assert await expect_abort(running) == b""
        await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)
        [outbound] = pair.lines.ended("outbound")
        assert outbound["error"] == "connection closed due to connection drain"
        assert outbound["reason"] == "drain"


async def test_removing_a_pod_ends_handshakes_too_with_a_line() -> None:
    async with a_pair() as pair, connect(pair.hbone) as silent:
        await trio.testing.wait_all_tasks_blocked()
        pair.mesh.running[pair.server].cancel()
        with trio.fail_after(10):
            assert await silent.receive_some(1) == b""
        [cut] = await pair.lines.wait_for_ends(1)
        assert cut["error"] == "connection closed due to connection drain"
        assert pair.mesh.node.handshakes.taken == 0


async def test_everything_may_end_in_any_order_while_data_flows() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        streams = [await a_running_call(pair) for _ in range(4)]
        for stream in streams:
            await stream.send_all(bytes(100_000))
    # The mesh is gone: it has checked that nothing was left behind.
    for stream in streams:
        await expect_abort(stream)
        await stream.aclose()
    assert len(pair.lines.ended()) == 8


# Aborts.


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_an_abort_of_the_client_is_an_abort_for_the_server(protocol: TunnelProtocol) -> None:
    async with a_pair(protocol=protocol) as pair:
        seen = trio.Event()

        async def app(stream: trio.SocketStream) -> None:
            await stream.send_all(await stream.receive_some(4))
            await expect_abort(stream)
            seen.set()

        pair.serve(app)
        abort(await a_running_call(pair))
        with trio.fail_after(10):
            await seen.wait()
        await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_an_abort_of_the_server_is_an_abort_for_the_client(protocol: TunnelProtocol) -> None:
    async def app(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some(4))
        abort(stream)

    async with a_pair(protocol=protocol) as pair:
        pair.serve(app)
        async with await a_running_call(pair) as running:
            assert await expect_abort(running) == b""
        await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)


@pytest.mark.parametrize("protocol", [TunnelProtocol.HBONE, TunnelProtocol.NONE])
async def test_an_answer_in_the_middle_of_an_upload_arrives(protocol: TunnelProtocol) -> None:
    answer = b"413 too much"

    async def app(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.send_all(answer)
        stream.socket.close()  # with more of the upload unread: the kernel resets

    async with a_pair(protocol=protocol) as pair:
        pair.serve(app)
        async with await pair.call() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(upload, stream)
            assert await read_exactly(stream, len(answer)) == answer
            nursery.cancel_scope.cancel()
        await pair.lines.wait_for_ends(2 if protocol is TunnelProtocol.HBONE else 1)


async def upload(stream: trio.SocketStream) -> None:
    try:
        while True:
            await stream.send_all(bytes(1_000_000))
    except trio.BrokenResourceError:
        return


# Limits, and what is not known in time.


async def test_one_connection_too_many_for_the_pod_is_reset() -> None:
    async with a_pair(max_connections_per_pod=1) as pair:
        pair.serve(echo)
        running = await a_running_call(pair)
        async with await pair.call() as refused:
            assert await expect_abort(refused) == b""
        [line] = await pair.lines.wait_for_ends(1)
        assert (line["message"], line["reason"]) == ("connection failed", "limit")
        assert line["error"] == "the pod has 1 connections already"
        await finish(running)
        await pair.lines.wait_for_ends(3)
        # The place is free again.
        await finish(await a_running_call(pair))
        await pair.lines.wait_for_ends(5)
        assert pair.mesh.node.metrics.sockets_open(Reporter.SOURCE).value == 0


@pytest.mark.parametrize("door", ["outbound", "inbound plaintext", "inbound"])
async def test_a_pod_that_the_control_plane_does_not_mention_in_time_is_not_served(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "LOCAL_WORKLOAD_SECONDS", 0.02)
    async with a_mesh() as mesh:
        proxy = await mesh.add_proxy(a_workload("new", ips=[loopback_address()]), hbone=0)
        direction = "outbound" if door == "outbound" else "inbound"
        async with connect(address_of(proxy, door)) as stream:
            with trio.fail_after(10):
                try:
                    assert await stream.receive_some(1) == b""
                except trio.BrokenResourceError:
                    assert door != "inbound"
        [line] = await mesh.lines.wait_for_ends(1)
        assert (line["message"], line["level"]) == ("connection failed", "warn")
        assert line["direction"] == direction
        assert (
            "failed to fetch information about local workload: default.shop (new)"
            in (line["error"])
        )


async def test_a_pod_that_the_control_plane_mentions_just_in_time_is_served() -> None:
    async with a_mesh() as mesh:
        workload = a_workload("new", ips=[loopback_address()])
        proxy = await mesh.add_proxy(workload, hbone=0)
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                await trio.testing.wait_all_tasks_blocked()
                mesh.put(workload)

            nursery.start_soon(tell)
            certificate = a_certificate(authority=mesh.authority)
            async with a_scripted_client(address_of(proxy, "inbound"), certificate):
                pass
        assert mesh.lines.ended() == []


async def test_an_application_that_never_answers_is_given_up() -> None:
    async with a_pair(connect_response_seconds=0.05) as pair:
        with a_full_queue(pair.app.socket):
            async with await pair.call() as stream:
                assert await expect_abort(stream) == b""
            outbound, inbound = await pair.ends()
        assert outbound["error"] == "no answer to CONNECT from the peer within 0.05s"
        assert inbound["error"] == "client reset the stream before it was connected (code 8)"


class a_full_queue:  # noqa: N801 - reads as a sentence
    """Make a listening socket ignore further connects."""

    def __init__(self, listener: trio.socket.SocketType) -> None:
        listener.listen(0)
        self._address = listener.getsockname()
        self._waiting: list[socket.socket] = []

    def __enter__(self) -> None:
        for _ in range(2):
            sock = socket.socket()
            sock.settimeout(0)
            sock.connect_ex(self._address)
            self._waiting.append(sock)

    def __exit__(self, *_: object) -> None:
        for sock in self._waiting:
            sock.close()
