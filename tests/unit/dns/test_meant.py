from __future__ import annotations

import errno

import structlog.testing
import trio
import trio.testing

from ztunnel.dns import meant as module
from ztunnel.dns.meant import REMEMBERED_SECONDS, Meant
from ztunnel.model.network import Endpoint

LOCAL = Endpoint.parse("127.0.0.1:15053")
FALLBACK = (Endpoint.parse("192.0.2.53:53"),)
RESOLVER = Endpoint.parse("10.96.0.10:53")
CLIENT = ("10.1.0.1", 40000)


class FakeConntrack:
    """Says what it is told to, and keeps what it was asked."""

    def __init__(self, meant: Endpoint | OSError | None) -> None:
        self.meant = meant
        self.asked: list[Endpoint] = []
        self.is_closed = False

    def original_destination(self, *, client: Endpoint, local: Endpoint) -> Endpoint | None:
        self.asked.append(client)
        if isinstance(self.meant, OSError):
            raise self.meant
        return self.meant

    def close(self) -> None:
        self.is_closed = True


async def test_the_table_is_asked_once_for_what_comes_from_one_socket() -> None:
    table = FakeConntrack(RESOLVER)
    meant = Meant(table, FALLBACK)
    for _ in range(2):
        assert meant.servers_of_datagram(CLIENT, LOCAL) == (RESOLVER,)
    assert table.asked == [Endpoint.of(CLIENT)]
    table.meant = FALLBACK[0]
    assert meant.servers_of_datagram(("10.1.0.1", 40001), LOCAL) == FALLBACK
    assert len(table.asked) == 2


async def test_what_came_in_by_another_door_is_another_flow() -> None:
    table = FakeConntrack(RESOLVER)
    meant = Meant(table, FALLBACK)
    meant.servers_of_datagram(CLIENT, LOCAL)
    table.meant = None
    assert meant.servers_of_datagram(CLIENT, Endpoint.parse("127.0.0.2:15053")) == FALLBACK


async def test_a_flow_is_remembered_for_a_moment_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    table = FakeConntrack(RESOLVER)
    meant = Meant(table, FALLBACK)
    meant.servers_of_datagram(CLIENT, LOCAL)
    await trio.sleep(REMEMBERED_SECONDS + 0.1)
    table.meant = Endpoint.parse("10.96.0.11:53")
    assert meant.servers_of_datagram(CLIENT, LOCAL) == (table.meant,)


async def test_what_is_remembered_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "CLIENTS_MAX", 3)
    meant = Meant(FakeConntrack(RESOLVER), FALLBACK)
    for port in range(1, 20):
        meant.servers_of_datagram(("10.1.0.1", port), LOCAL)
        assert len(meant._known) <= 3


async def test_a_flow_that_is_unknown_is_looked_for_again() -> None:
    table = FakeConntrack(None)
    meant = Meant(table, FALLBACK)
    assert meant.servers_of_datagram(CLIENT, LOCAL) == FALLBACK
    table.meant = RESOLVER
    assert meant.servers_of_datagram(CLIENT, LOCAL) == (RESOLVER,)


async def test_what_was_sent_to_us_by_name_is_for_the_fallback() -> None:
    assert Meant(FakeConntrack(LOCAL), FALLBACK).servers_of_datagram(CLIENT, LOCAL) == FALLBACK


async def test_a_table_that_refuses_is_not_asked_again() -> None:
    table = FakeConntrack(PermissionError(errno.EPERM, "no"))
    meant = Meant(table, FALLBACK)
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            assert meant.servers_of_datagram(CLIENT, LOCAL) == FALLBACK
    assert len(table.asked) == len(lines) == 1
    assert table.is_closed


async def test_without_a_table_only_the_fallback_is_known() -> None:
    meant = Meant(None, FALLBACK)
    assert meant.servers_of_datagram(CLIENT, LOCAL) == FALLBACK
    meant.close()
