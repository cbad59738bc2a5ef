from __future__ import annotations

import dns.message
import pytest
import trio
import trio.testing

from tests.support.wire_cuts import cut
from ztunnel.dns import stream as module
from ztunnel.dns.resolver import Pending, Transport
from ztunnel.dns.stream import IDLE_SECONDS, QUERIES_MAX, StreamQueries
from ztunnel.wire import dns as wire
from ztunnel.wire.dns import MessageSplitter, framed


def a_query(name: str, number: int = 1) -> bytes:
    return dns.message.make_query(name, "A", id=number).to_wire()


class FakeResolver:
    """Answers names that begin with `now` at once, drops `junk`, the rest when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stream_queries = 0
        self.waiting: dict[str, trio.Event] = {}

    def ask(self, data: bytes, transport: Transport) -> bytes | Pending | None:
        assert transport is Transport.TCP
        query = wire.parse_query(data)
        assert isinstance(query, wire.Query)
        self.asked.append(query.name)
        if query.name.startswith("junk"):
            return None
        if query.name.startswith("now"):
            return query.name.encode()
        return Pending(data, query, None, transport)

    async def finish_stream(self, pending: Pending, servers: object, deliver) -> None:
        event = self.waiting[pending.query.name] = trio.Event()
        await event.wait()
        await deliver(pending.query.name.encode())

    def refuse(self, pending: Pending) -> bytes:
        return f"no {pending.query.name}".encode()

    def answer(self, name: str) -> None:
        self.waiting[name].set()


class Scene:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.client, server = trio.testing.memory_stream_pair()
        self.resolver = FakeResolver()
        self.ended = trio.Event()
        self._splitter = MessageSplitter()
        queries = StreamQueries(server, self.resolver, ())

        async def serve() -> None:
            await queries.serve()
            self.ended.set()

        nursery.start_soon(serve)

    async def ask(self, *names: str) -> None:
        await self.client.send_all(b"".join(framed(a_query(name)) for name in names))
        await trio.testing.wait_all_tasks_blocked()

    async def hears(self, count: int = 1) -> list[str]:
        """Wait for so many answers; fewer at the end."""
        heard: list[str] = []
        while len(heard) < count and (chunk := await self.client.receive_some(65536)):
            heard += [message.decode() for message in self._splitter.feed(bytes(chunk))]
        return heard


@pytest.fixture
def scene(nursery: trio.Nursery) -> Scene:
    return Scene(nursery)


async def test_several_queries_on_one_connection_are_answered(scene: Scene) -> None:
    await scene.ask("now1")
    assert await scene.hears() == ["now1"]
    await scene.ask("now2", "junk", "now3")
    assert await scene.hears(2) == ["now2", "now3"]


async def test_a_slow_query_does_not_hold_up_the_next(scene: Scene) -> None:
    await scene.ask("slow", "slower", "now")
    assert await scene.hears() == ["now"]
    scene.resolver.answer("slower")
    assert await scene.hears() == ["slower"]
    scene.resolver.answer("slow")
    assert await scene.hears() == ["slow"]


async def test_queries_are_found_however_the_stream_is_cut(scene: Scene) -> None:
    data = framed(a_query("now1")) + framed(a_query("now2"))
    for piece in cut(data, list(range(len(data)))):
        await scene.client.send_all(piece)
    assert await scene.hears(2) == ["now1", "now2"]


async def test_a_client_that_has_finished_asking_still_gets_its_answers(scene: Scene) -> None:
    await scene.ask("slow")
    await scene.client.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    scene.resolver.answer("slow")
    assert await scene.hears() == ["slow"]
    assert await scene.hears() == []
    await scene.ended.wait()


async def test_an_idle_connection_is_closed(scene: Scene, autojump_clock: object) -> None:
    started = trio.current_time()
    assert await scene.hears() == []
    assert trio.current_time() - started == pytest.approx(IDLE_SECONDS)
    await scene.ended.wait()


async def test_single_bytes_are_no_sign_of_life(scene: Scene, autojump_clock: object) -> None:
    started = trio.current_time()
    for byte in framed(a_query("now")):
        if scene.ended.is_set():
            break
        await scene.client.send_all(bytes([byte]))
        await trio.sleep(1)
    assert scene.ended.is_set()
    assert trio.current_time() - started == pytest.approx(IDLE_SECONDS, abs=1)
    assert scene.resolver.asked == []


async def test_after_a_late_answer_there_is_time_for_another_query(
    scene: Scene, autojump_clock: object
) -> None:
    await scene.ask("later")
    await trio.sleep(IDLE_SECONDS - 0.1)
    scene.resolver.answer("later")
    await trio.sleep(IDLE_SECONDS - 0.1)
    await scene.ask("now")
    assert await scene.hears(2) == ["later", "now"]


async def test_a_message_longer_than_any_query_ends_the_connection(scene: Scene) -> None:
    too_long = (wire.QUERY_BYTES_MAX + 1).to_bytes(2, "big")
    await scene.client.send_all(framed(a_query("now")) + too_long)
    assert await scene.hears() == ["now"]
    with trio.fail_after(2):
        await scene.ended.wait()


async def test_a_connection_that_waits_for_an_answer_is_not_idle(
    scene: Scene, autojump_clock: object
) -> None:
    await scene.ask("slow")
    await trio.sleep(3 * IDLE_SECONDS)
    scene.resolver.answer("slow")
    assert await scene.hears() == ["slow"]
    assert await scene.hears() == []


async def test_queries_under_way_are_bounded(scene: Scene) -> None:
    names = [f"slow{number}" for number in range(QUERIES_MAX + 5)]
    await scene.ask(*names)
    assert len(scene.resolver.waiting) == QUERIES_MAX
    scene.resolver.answer("slow3")
    assert await scene.hears() == ["slow3"]
    await trio.testing.wait_all_tasks_blocked()
    assert len(scene.resolver.waiting) == QUERIES_MAX + 1


async def test_all_connections_together_have_a_limit(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POD_QUERIES_MAX", 2)
    await scene.ask("slow1", "slow2", "slow3", "now")
    assert await scene.hears(2) == ["no slow3", "now"]
    scene.resolver.answer("slow1")
    assert await scene.hears() == ["slow1"]
    await scene.ask("slow4")
    assert sorted(scene.resolver.waiting) == ["slow1", "slow2", "slow4"]
    await scene.client.aclose()
    scene.resolver.answer("slow2")
    scene.resolver.answer("slow4")
    with trio.fail_after(1):
        await scene.ended.wait()
    assert scene.resolver.stream_queries == 0


async def test_a_client_that_goes_away_ends_everything(scene: Scene) -> None:
    await scene.ask("slow1", "slow2")
    await scene.client.aclose()
    scene.resolver.answer("slow1")
    scene.resolver.answer("slow2")
    with trio.fail_after(1):
        await scene.ended.wait()


async def test_a_client_that_does_not_read_is_given_up(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    client, server = trio.testing.lockstep_stream_pair()
    ended = trio.Event()

    async def serve() -> None:
        await StreamQueries(server, FakeResolver(), ()).serve()
        ended.set()

    nursery.start_soon(serve)
    await client.send_all(framed(a_query("now")))
    with trio.fail_after(module.SEND_SECONDS + 1):
        await ended.wait()
