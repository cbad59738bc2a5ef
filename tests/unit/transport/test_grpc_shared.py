"""Calls that share a connection: with a real gRPC server, and with one that does as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trio.testing

from tests.support.certs import AUTHORITY
from tests.support.grpc_echo import EchoServer
from tests.support.grpc_script import Peer, Script, serving
from ztunnel.errors import CallError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport import grpc_shared as module
from ztunnel.transport.grpc import GrpcClient
from ztunnel.transport.grpc_access import GrpcAccess
from ztunnel.transport.pace import Pace
from ztunnel.transport.secure_link import open_link

ROOTS = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())
SECONDS = 10.0


@asynccontextmanager
async def sharing(port: int, **more: object) -> AsyncIterator[GrpcClient]:
    client = GrpcClient(
        GrpcAccess(**{"server": ServerUrl("localhost", port), "root": ROOTS, **more})
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.share)
        await trio.testing.wait_all_tasks_blocked()
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def an_echo(port: int = 0) -> AsyncIterator[EchoServer]:
    server = EchoServer("localhost", port=port)
    try:
        yield server
    finally:
        server.stop()


async def echo(client: GrpcClient, message: bytes = b"hello", *, seconds: float = SECONDS) -> bytes:
    return await client.unary("/lab.Echo/Unary", message, seconds=seconds)


async def failure_of(client: GrpcClient, message: bytes = b"hello", **more: float) -> CallError:
    with pytest.raises(CallError) as caught:
        await echo(client, message, **more)
    return caught.value


async def test_calls_at_once_and_soon_after_share_one_connection() -> None:
    async with an_echo() as server, sharing(server.port) as client:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(echo, client, b"%d" % number)
        assert await echo(client) == b"hello"
        assert len(server.peers) == 21
        assert len(set(server.peers)) == 1


async def test_without_sharing_each_has_its_own() -> None:
    async with an_echo() as server:
        client = GrpcClient(GrpcAccess(server=ServerUrl("localhost", server.port), root=ROOTS))
        await echo(client)
        await echo(client)
        assert len(set(server.peers)) == 2


async def test_another_token_is_shown_on_another_connection(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = Source(SourceKind.FILE, str(path))
    async with an_echo() as server, sharing(server.port, token=token) as client:
        for text in ("one", "one", "two", "two"):
            path.write_text(text)
            await echo(client)
        shown = [seen["authorization"] for seen in server.seen]
        assert shown == ["Bearer one", "Bearer one", "Bearer two", "Bearer two"]
        first, again, second, once_more = server.peers
        assert first == again != second == once_more


async def test_a_new_root_is_for_new_connections_and_calls_under_way_go_on(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(AUTHORITY.roots_pem)
    answers: list[bytes] = []
    root = Source(SourceKind.FILE, str(path))
    async with an_echo() as server, sharing(server.port, root=root) as client:

        async def slow() -> None:
            answers.append(await echo(client, b"wait"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow)
            await trio.to_thread.run_sync(server.is_waiting.wait, SECONDS)
            path.write_bytes(DevelopmentCa.create().roots_pem)
            assert (await failure_of(client)).status == "UNAVAILABLE"
            path.write_bytes(AUTHORITY.roots_pem + DevelopmentCa.create().roots_pem)
            assert await echo(client) == b"hello"
            assert answers == []
            server.released.set()
    assert answers == [b"wait"]
    assert len(set(server.peers)) == 2


async def test_a_connection_that_is_old_gets_no_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGE_SECONDS_MAX", 0.0)
    async with an_echo() as server, sharing(server.port) as client:
        await echo(client)
        await echo(client)
        assert len(set(server.peers)) == 2


async def test_each_call_has_its_own_deadline_and_its_own_error() -> None:
    statuses: dict[bytes, str] = {}
    async with an_echo() as server, sharing(server.port) as client:

        async def fail(message: bytes, seconds: float) -> None:
            statuses[message] = (await failure_of(client, message, seconds=seconds)).status

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, b"wait", 0.2)
            nursery.start_soon(fail, b"abort", SECONDS)
            nursery.start_soon(echo, client)
        assert statuses == {b"wait": "DEADLINE_EXCEEDED", b"abort": "UNAUTHENTICATED"}
        assert await echo(client) == b"hello"
        assert len(set(server.peers)) == 1
        assert len(server.peers) == 4  # what the server refused was not asked again


async def test_who_leaves_while_it_connects_takes_nothing_from_the_others() -> None:
    async with an_echo() as server, sharing(server.port) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo, client)
            with trio.move_on_after(0):
                await echo(client)
        assert await echo(client) == b"hello"
        assert len(set(server.peers)) == 1


async def test_a_server_that_restarts_is_found_again() -> None:
    async with an_echo() as server, sharing(server.port) as client:
        await echo(client)
        await trio.to_thread.run_sync(server.stop)
        assert (await failure_of(client)).status == "UNAVAILABLE"
        async with an_echo(server.port):
            assert await echo(client) == b"hello"


async def test_when_nobody_is_there_all_hear_why_and_who() -> None:
    errors: list[CallError] = []
    async with sharing(1) as client:

        async def fail() -> None:
            errors.append(await failure_of(client))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fail)
    assert {error.status for error in errors} == {"UNAVAILABLE"}
    assert len({id(error) for error in errors}) == 5
    assert all("localhost:1)" in str(error) for error in errors)


async def test_when_the_client_ends_calls_under_way_do_too_and_later_ones_are_alone() -> None:
    errors: list[CallError] = []
    async with an_echo() as server:
        async with trio.open_nursery() as nursery, sharing(server.port) as client:

            async def fail() -> None:
                errors.append(await failure_of(client, b"wait"))

            nursery.start_soon(fail)
            await trio.to_thread.run_sync(server.is_waiting.wait, SECONDS)
        assert [error.status for error in errors] == ["CANCELLED"]
        server.released.set()
        assert await echo(client) == b"hello"


async def test_a_connection_that_was_idle_for_long_enough_is_not_taken_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    async with an_echo() as server, trio.open_nursery() as nursery:
        access = GrpcAccess(server=ServerUrl("localhost", server.port), root=ROOTS)
        trust = access.read_trust()
        calls = module.SharedCalls(
            access.server, lambda context: open_link(access.server, context, "localhost", Pace())
        )
        await nursery.start(calls.run)
        for _ in range(2):  # with not a moment between, in which it could be closed
            answer = await calls.call("/lab.Echo/Unary", b"x", trust, (), seconds=SECONDS)
            assert answer == b"x"
        assert len(set(server.peers)) == 2
        nursery.cancel_scope.cancel()


async def answer(peer: Peer, stream_id: int) -> None:
    await peer.answer(stream_id)


async def test_an_idle_connection_is_closed_in_good_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)
    script = Script(answer)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            assert await echo(client) == b"hello"
            await script.farewells.wait()
            assert isinstance(script.events[-1], h2.events.ConnectionTerminated)
            assert await echo(client) == b"hello"
    assert script.connections == 2


async def test_one_that_is_in_use_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)

    async def answer_the_second_late(peer: Peer, stream_id: int) -> None:
        if script.calls > 1:
            await trio.sleep(0.3)  # the time that has to pass is what this is about
        await peer.answer(stream_id)

    script = Script(answer_the_second_late)
    async with serving(script) as port, sharing(port) as client:
        assert await echo(client) == b"hello"
        assert await echo(client) == b"hello"


async def test_a_call_that_is_given_up_is_reset_and_the_connection_lives_on() -> None:
    async def answer_the_second(peer: Peer, stream_id: int) -> None:
        if script.calls > 1:
            await peer.answer(stream_id)

    script = Script(answer_the_second)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            assert (await failure_of(client, seconds=0.2)).status == "DEADLINE_EXCEEDED"
            await script.heard[h2.events.StreamReset].wait()
            assert await echo(client) == b"hello"
    assert script.connections == 1


async def test_after_a_goaway_calls_begin_elsewhere_and_the_old_connection_ends() -> None:
    async def answer_and_go(peer: Peer, stream_id: int) -> None:
        await peer.answer(stream_id)
        if script.calls == 1:
            await peer.go_away(stream_id)

    script = Script(answer_and_go)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            assert await echo(client) == b"hello"
            await script.farewells.wait()
            assert await echo(client) == b"hello"
            assert await echo(client) == b"hello"
    assert (script.connections, script.calls) == (2, 3)


async def test_what_is_under_way_at_a_goaway_is_still_answered_and_then_we_hang_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 1000.0)
    answer_at_last: list[Callable[[], Awaitable[None]]] = []
    answers: list[bytes] = []

    async def go_away_and_ping(peer: Peer, stream_id: int) -> None:
        if script.calls > 1:
            await peer.answer(stream_id)
        else:
            answer_at_last.append(partial(peer.answer, stream_id))
            await peer.go_away(stream_id)
            peer.h2.ping(b"all read")

    async def ask() -> None:
        answers.append(await echo(client))

    script = Script(go_away_and_ping)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await script.heard[h2.events.PingAckReceived].wait()
                await ask()
                await ask()
                assert len(answers) == 2
                assert not script.farewells.is_set()
                await answer_at_last[0]()
            await script.farewells.wait()
    assert answers == [b"hello"] * 3
    assert script.connections == 2


async def go_away(peer: Peer, stream_id: int) -> None:
    await peer.go_away(stream_id - 2 if stream_id > 1 else 0)


async def refuse(peer: Peer, stream_id: int) -> None:
    peer.h2.reset_stream(stream_id, 7)


async def hang_up(peer: Peer, stream_id: int) -> None:
    await trio.aclose_forcefully(peer.stream)


LEAVING = [
    pytest.param(go_away, id="GOAWAY"),
    pytest.param(refuse, id="refused"),
    pytest.param(hang_up, id="hung up"),
]


@pytest.mark.parametrize("leave", LEAVING)
async def test_a_call_that_crosses_the_end_of_a_used_connection_is_made_once_more(
    leave: Callable[[Peer, int], Awaitable[None]],
) -> None:
    async def leave_at_the_second(peer: Peer, stream_id: int) -> None:
        await (leave if script.calls == 2 else answer)(peer, stream_id)

    script = Script(leave_at_the_second)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            assert await echo(client) == b"hello"
            assert await echo(client) == b"hello"
    assert script.calls == 3


@pytest.mark.parametrize("leave", LEAVING)
async def test_a_server_that_always_leaves_is_asked_once_on_a_new_connection(
    leave: Callable[[Peer, int], Awaitable[None]],
) -> None:
    script = Script(leave)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            assert (await failure_of(client)).status == "UNAVAILABLE"
    assert script.calls == 1


async def test_more_calls_than_a_server_takes_at_once_have_connections_of_their_own() -> None:
    released = trio.Event()

    async def answer_when_both_are_here(peer: Peer, stream_id: int) -> None:
        if script.calls == 3:
            released.set()
        elif script.calls > 1:
            await released.wait()
        await peer.answer(stream_id)

    script = Script(answer_when_both_are_here, streams=1)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            await echo(client)  # now its settings are known
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo, client)
                nursery.start_soon(echo, client)
    assert (script.connections, script.calls) == (2, 3)


async def say_unavailable(peer: Peer, stream_id: int) -> None:
    head = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "14")]
    peer.h2.send_headers(stream_id, head, end_stream=True)


async def reset(peer: Peer, stream_id: int) -> None:
    peer.h2.reset_stream(stream_id, 2)


@pytest.mark.parametrize("end", [say_unavailable, reset])
async def test_what_the_server_has_looked_at_is_not_asked_again(
    end: Callable[[Peer, int], Awaitable[None]],
) -> None:
    async def end_the_second(peer: Peer, stream_id: int) -> None:
        await (end if script.calls == 2 else answer)(peer, stream_id)

    script = Script(end_the_second)
    with trio.fail_after(SECONDS):
        async with serving(script) as port, sharing(port) as client:
            await echo(client)
            assert (await failure_of(client)).status in {"UNAVAILABLE", "INTERNAL"}
            await echo(client)
    assert (script.connections, script.calls) == (1, 3)
