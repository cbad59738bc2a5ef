from __future__ import annotations

import socket
import struct

import pytest
import trio
import trio.testing

from tests.support.certs import an_established_pair
from tests.support.tunnels import (
    CONNECT,
    CONTEXTS,
    Heard,
    TunnelPair,
    a_reactor,
    a_tunnel_pair,
    facts,
    open_descriptors,
    socket_pair,
)
from ztunnel.errors import LimitError, PeerError, TlsError, TunnelError
from ztunnel.transport import reactor as reactor_module, tunnel as module
from ztunnel.transport.buffers import UNIT_FIRST
from ztunnel.transport.reactor import READABLE
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.settings import HboneSettings

BOTH_RECORD_LAYERS = pytest.mark.parametrize("own_records", [True, False])


@pytest.fixture
def quick_ticks(monkeypatch) -> None:
    monkeypatch.setattr(reactor_module, "TICK_SECONDS", 0.002)


@BOTH_RECORD_LAYERS
async def test_a_stream_is_requested_answered_and_carries_data_both_ways(*, own_records) -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor, own_records=own_records) as pair:
        stream, served = await pair.a_stream()
        served.owner = Heard()
        for tunnel, sender, receiver in (
            (pair.client, stream, served),
            (pair.server, served, stream),
        ):
            tunnel.core.queue_data(sender, b"hello")
            tunnel.core.finish(sender)
            tunnel.flush_later()
            await receiver.owner.until("on_end")
            assert receiver.owner.received == b"hello"
        assert pair.client.core.streams == pair.server.core.streams == {}
        assert pair.client.opened == 1


async def test_an_end_in_good_order_is_no_error() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        pair.client.close()
        assert await pair.server_owner.until("on_closed") == (pair.server, None)
        assert pair.server.closed
        assert not pair.server.accepts_streams


async def test_closing_twice_is_told_once() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        pair.client.close()
        pair.client.close(PeerError("later"))
        assert pair.client_owner.heard("on_closed") == [(pair.client, None)]


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
async def test_a_cut_loses_the_streams_that_were_open(how: str) -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        stream, _ = await pair.a_stream()
        sock = pair.server.sock
        if how == "shutdown":
            sock.shutdown(socket.SHUT_WR)  # no close_notify: a truncation
        else:
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            reactor.forget(sock)
            sock.close()
        (lost,) = await stream.owner.until("on_lost")
        assert isinstance(lost, PeerError)
        _, error = await pair.client_owner.until("on_closed")
        assert error is lost is pair.client.closed_because


async def test_a_broken_frame_is_answered_with_goaway_and_ends_the_connection() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        pair.client.core.control += b"\x00\x00\x05\x06\x00\x00\x00\x00\x00hello"
        pair.client.flush_later()
        _, error = await pair.server_owner.until("on_closed")
        assert isinstance(error, TunnelError)
        await pair.client_owner.until("on_goaway")
        assert pair.client.core.goaway_received.code == error.code


@BOTH_RECORD_LAYERS
async def test_a_broken_record_is_answered_with_an_alert(*, own_records) -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor, own_records=own_records) as pair:
        pair.client.sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        _, error = await pair.server_owner.until("on_closed")
        assert isinstance(error, TlsError)
        _, told = await pair.client_owner.until("on_closed")
        assert isinstance(told, TlsError)
        assert "bad record mac" in str(told).replace("_", " ").lower()


async def test_a_bug_in_serving_ends_that_tunnel_and_no_other() -> None:
    class Broken(Heard):
        def on_request(self, *arguments: object) -> None:
            raise RuntimeError("a bug")

    async with (
        a_reactor() as reactor,
        a_tunnel_pair(reactor) as pair,
        a_tunnel_pair(reactor) as neighbour,
    ):
        pair.server._owner = Broken()
        stream = pair.client.open(CONNECT, Heard())
        await stream.owner.until("on_lost")
        assert "internal error: a bug" in str(pair.server.closed_because)
        await neighbour.a_stream()


async def test_no_stream_is_opened_beyond_what_the_peer_takes() -> None:
    settings = HboneSettings(max_concurrent_streams=1)
    async with a_reactor() as reactor, a_tunnel_pair(reactor, server_settings=settings) as pair:
        await pair.a_stream()
        with pytest.raises(LimitError):
            pair.client.open(CONNECT, Heard())
        pair.client.close()
        with pytest.raises(LimitError, match="takes no more streams"):
            pair.client.open(CONNECT, Heard())


async def test_a_drained_tunnel_serves_its_streams_to_the_end_and_says_which_was_the_last(
    quick_ticks,
) -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        stream, served = await pair.a_stream()
        served.owner = Heard()
        pair.server.drain()
        pair.server.drain()
        await pair.client_owner.until("on_goaway", 2)
        assert pair.client.core.goaway_received.last_stream_id == stream.id
        assert not pair.client.accepts_streams
        assert not pair.server.accepts_streams
        pair.client.core.finish(stream)
        pair.client.flush_later()
        await served.owner.until("on_end")
        pair.server.core.finish(served)
        pair.server.released()
        assert await pair.server_owner.until("on_closed") == (pair.server, None)
        assert await pair.client_owner.until("on_closed") == (pair.client, None)


async def test_an_idle_tunnel_is_drained_at_once(quick_ticks) -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        pair.client.drain()
        await pair.server_owner.until("on_closed")


class Wants(Heard):
    def pump(self) -> None:
        self.note("ended")


async def test_a_peer_that_does_not_read_blocks_and_the_waiting_are_resumed() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        reactor.forget(pair.server.sock)  # so it does not read
        filler, wants = Heard(), Wants()
        chunk = b"\x00\x00\x08\x06\x01\x00\x00\x00\x00" + b"12345678"  # a PING's answer
        while not pair.client.blocked:
            pair.client.core.control += chunk * 10_000
            pair.client.flush()
        pair.client.wait(wants)
        forgotten = Wants()
        pair.client.wait(forgotten)
        pair.client.forget(forgotten)
        assert wants.calls == filler.calls == []
        drained = socket.socket(fileno=socket.dup(pair.server.sock.fileno()))
        drained.settimeout(0)
        with trio.fail_after(5):
            while pair.client.blocked or not wants.calls:
                try:
                    drained.recv(1 << 20)
                except BlockingIOError:
                    await trio.lowlevel.checkpoint()
        drained.close()
        assert forgotten.calls == []
        reactor.register(pair.server.sock, pair.server)


async def test_a_peer_that_asks_without_end_and_reads_no_answer_is_cut_off() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        server, owner = pair.server, pair.server_owner
        refuse = lambda _, request: server.core.refuse(request.stream, 400)  # noqa: E731
        owner.on_request = refuse
        server._outbox.send(b"", bytes(16 << 20))  # more than the two sockets take
        reactor.forget(pair.client.sock)
        assert server.blocked
        headers = pair.client.core
        with trio.fail_after(20):
            while not server.closed:
                for _ in range(100):
                    stream = headers.open(CONNECT)
                    del headers.streams[stream.id]
                pair.client.flush()
                await trio.testing.wait_all_tasks_blocked()
        assert "reads no answers" in str(owner.heard("on_closed")[0][1])
        assert len(server.core.control) < 2 << 20
        reactor.register(pair.client.sock, pair.client)


async def test_a_peer_that_does_not_read_gets_one_answer_to_many_wishes_for_new_keys() -> None:
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        server, client = pair.server, pair.client
        _, served = await pair.a_stream()
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reactor.forget(client.sock)
        while not server.blocked:
            server.core.queue_data(served, bytes(16_384))
            server.flush()
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            client.sock.send(client._records.key_update(request=True))  # type: ignore[attr-defined]
            await trio.testing.wait_all_tasks_blocked()
        reactor.register(client.sock, client)
        with trio.fail_after(5):
            while server.blocked:
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        # Not twenty; the kernel may have taken a little more at first.
        assert 1 <= server._records._sealer.rekeys <= 3  # type: ignore[attr-defined]
        await pair.a_stream()  # both ends go on with keys that fit


async def test_a_silent_peer_is_pinged_and_then_given_up(quick_ticks, monkeypatch) -> None:
    monkeypatch.setattr(module, "PING_SECONDS", 0.01)
    ours, theirs = socket_pair()
    established, _ = an_established_pair(*CONTEXTS[True])
    async with a_reactor() as reactor:
        owner = Heard()
        core = HboneConnection(client=True)
        Tunnel(reactor, ours, established.records, core, owner, facts()).start(b"")
        _, error = await owner.until("on_closed")
        assert str(error) == "HBONE ping timeout"
    theirs.close()


async def test_two_live_peers_keep_each_other_alive(quick_ticks, monkeypatch) -> None:
    monkeypatch.setattr(module, "PING_SECONDS", 0.005)
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        much_later = Heard()
        reactor.deadline(0.1, much_later.ended)
        await much_later.until("ended")
        assert not pair.client.closed
        await pair.a_stream()


def is_parked(tunnel: Tunnel) -> bool:
    return all(keys.cipher is None for keys in tunnel._records.directions())  # type: ignore[attr-defined]


async def until_parked(pair: TunnelPair) -> None:
    with trio.fail_after(5):
        while not (is_parked(pair.client) and is_parked(pair.server)):
            await trio.testing.wait_all_tasks_blocked()


async def test_a_tunnel_parks_soon_after_whatever_woke_it_up(quick_ticks, monkeypatch) -> None:
    monkeypatch.setattr(module, "PARK_SECONDS", 0.005)
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        await until_parked(pair)
        for _ in range(2):
            await pair.a_stream()
            await until_parked(pair)
            pair.client.core.ping(module.PING_PAYLOAD)
            pair.client.flush()
            assert not is_parked(pair.client)
            await trio.testing.wait_all_tasks_blocked()
            await until_parked(pair)


async def test_a_tunnel_stays_awake_until_then(quick_ticks, monkeypatch) -> None:
    monkeypatch.setattr(module, "PARK_SECONDS", 60.0)
    monkeypatch.setattr(module, "PING_SECONDS", 0.005)
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        await pair.a_stream()
        later = Heard()
        reactor.deadline(0.05, later.ended)  # after some pings
        await later.until("ended")
        assert not is_parked(pair.client)
        assert not is_parked(pair.server)


async def test_after_a_read_of_the_largest_unit_the_peer_gets_credit_before_the_next(
    monkeypatch,
) -> None:
    monkeypatch.setattr(module, "UNIT_MOST", UNIT_FIRST)
    monkeypatch.setattr(module, "grown", lambda unit, size: unit)
    message = bytes(UNIT_FIRST // 2)
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        stream, served = await pair.a_stream()
        for _ in range(6):
            pair.server.core.queue_data(served, message)
            pair.server.flush()
        pair.client.on_event(READABLE)  # nothing is awaited: this is one turn
        assert 0 < len(stream.owner.received) < UNIT_FIRST
        while len(stream.owner.received) < 6 * len(message):
            await stream.owner.until("on_data", len(stream.owner.heard("on_data")) + 1)


async def test_what_came_behind_the_handshake_is_not_lost() -> None:
    ours, theirs = socket_pair()
    client, server = an_established_pair(*CONTEXTS[True])
    peer = HboneConnection(client=True)
    leftover = bytes(client.records.seal_small(peer.control))
    async with a_reactor() as reactor:
        owner = Heard()
        core = HboneConnection(client=False)
        tunnel = Tunnel(reactor, ours, server.records, core, owner, facts())
        tunnel.start(leftover)
        await owner.until("on_settings")
        tunnel.close()
    theirs.close()


async def test_nothing_is_left_of_tunnels_that_were_closed() -> None:
    before = open_descriptors()
    async with a_reactor() as reactor, a_tunnel_pair(reactor) as pair:
        await pair.a_stream()
    assert open_descriptors() == before
