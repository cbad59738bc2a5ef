from __future__ import annotations

import errno
import socket
from pathlib import Path

import dns.message
import dns.rcode
import pytest
import structlog.testing
import trio
import trio.testing

from tests.support.builders import a_service, a_store
from tests.support.dns import FakeClient, Served, a_dns_server
from tests.support.resolvers import a_resolver, answered, silence
from tests.support.tunnels import open_descriptors
from ztunnel.config import Config
from ztunnel.dns import server as module
from ztunnel.dns.meant import Meant
from ztunnel.dns.resolver import Forwarded
from ztunnel.dns.server import DnsSettings
from ztunnel.errors import ConfigError
from ztunnel.model.network import Endpoint
from ztunnel.model.settings import ProxyMode
from ztunnel.wire.dns import framed

STORE = a_store(a_service(vips=["10.0.0.1"]))
RECORD = "example.org. 60 IN A 192.0.2.1"


class FakeConntrack:
    """Says that every query was meant for one resolver."""

    def __init__(self, meant: Endpoint | OSError | None) -> None:
        self.meant = meant
        self.asked: list[tuple[Endpoint, Endpoint]] = []
        self.is_closed = False

    def original_destination(self, *, client: Endpoint, local: Endpoint) -> Endpoint | None:
        self.asked.append((client, local))
        if isinstance(self.meant, OSError):
            raise self.meant
        return self.meant

    def close(self) -> None:
        self.is_closed = True


def a_query(name: str = "cart.shop", number: int = 7, rtype: str = "A") -> bytes:
    return dns.message.make_query(name, rtype, id=number).to_wire()


class Asker:
    """A UDP client."""

    def __init__(self, server: Endpoint) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((str(server.ip), server.port))
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.here = Endpoint.of(sock.getsockname())

    async def send(self, data: bytes) -> None:
        await self.sock.send(data)

    async def hears(self) -> dns.message.Message:
        with trio.fail_after(5):
            return dns.message.from_wire(await self.sock.recv(65535))

    async def asks(self, data: bytes) -> dns.message.Message:
        await self.send(data)
        return await self.hears()


def an_asker(served: Served) -> Asker:
    asker = Asker(served.server.addresses[0])
    served.undo.callback(asker.sock.close)
    return asker


def meaning(served: Served, meant: Endpoint | OSError | None) -> FakeConntrack:
    table = FakeConntrack(meant)
    served.server._meant.close()
    served.server._meant = Meant(table, served.server._meant._fallback)
    return table


async def test_mesh_names_are_answered_by_udp() -> None:
    async with a_dns_server(STORE) as served:
        reply = await an_asker(served).asks(a_query())
        assert [str(rrset) for rrset in reply.answer] == ["cart.shop. 30 IN A 10.0.0.1"]


async def test_mesh_names_are_answered_by_tcp() -> None:
    async with a_dns_server(STORE) as served:
        here = served.server.addresses[0]
        async with await trio.open_tcp_stream(str(here.ip), here.port) as stream:
            await stream.send_all(framed(a_query()))
            reply = dns.message.from_wire((await stream.receive_some())[2:])
    assert [str(rrset) for rrset in reply.answer] == ["cart.shop. 30 IN A 10.0.0.1"]


async def test_other_names_are_asked_where_the_pod_meant_to() -> None:
    async with (
        a_resolver(lambda data, _: [answered(data, RECORD)]) as resolver,
        a_dns_server(STORE) as served,
    ):
        table = meaning(served, resolver.endpoint)
        asker = an_asker(served)
        reply = await asker.asks(a_query("example.org"))
        assert reply == dns.message.from_wire(answered(a_query("example.org"), RECORD))
        assert table.asked == [(asker.here, served.server.addresses[0])]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_what_was_sent_to_us_by_name_goes_to_our_own_resolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    async with a_resolver(lambda data, _: [answered(data, RECORD)]) as resolver:
        monkeypatch.setattr("ztunnel.dns.resolv_conf.DNS_PORT", resolver.endpoint.port)
        conf = tmp_path / "resolv.conf"
        conf.write_text(f"nameserver {resolver.endpoint.ip}\n")
        async with a_dns_server(STORE, resolv_conf=conf) as served:
            here = served.server.addresses[0]
            meaning(served, here)
            if transport == "udp":
                reply = await an_asker(served).asks(a_query("example.org"))
            else:
                async with await trio.open_tcp_stream(str(here.ip), here.port) as stream:
                    await stream.send_all(framed(a_query("example.org")))
                    reply = dns.message.from_wire((await stream.receive_some())[2:])
    assert [str(rrset) for rrset in reply.answer] == [RECORD]


async def test_if_the_kernel_does_not_say_it_is_not_asked_again() -> None:
    async with a_dns_server(STORE) as served:
        table = meaning(served, PermissionError(errno.EPERM, "no"))
        asker = an_asker(served)
        for _ in range(2):
            reply = await asker.asks(a_query("example.org"))
            assert reply.rcode() == dns.rcode.SERVFAIL
        assert len(table.asked) == 1
        assert table.is_closed


async def test_a_slow_query_holds_up_no_other() -> None:
    async with a_resolver(silence) as resolver, a_dns_server(STORE) as served:
        meaning(served, resolver.endpoint)
        asker = an_asker(served)
        await asker.send(a_query("example.org"))
        assert (await asker.asks(a_query())).answer


async def test_a_query_asked_again_while_under_way_is_sent_on_once() -> None:
    answering = trio.Event()

    def script(data: bytes, number: int) -> list[bytes]:
        answering.set()
        return []

    async with a_resolver(script) as resolver, a_dns_server(STORE) as served:
        meaning(served, resolver.endpoint)
        asker = an_asker(served)
        for number in (1, 1, 1, 2):
            await asker.send(a_query("example.org", number))
        await answering.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(resolver.asked) == 2


async def test_queries_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_MAX", 2)
    async with a_resolver(silence) as resolver, a_dns_server(STORE) as served:
        meaning(served, resolver.endpoint)
        asker = an_asker(served)
        for number in (1, 2, 3):
            await asker.send(a_query("example.org", number))
        reply = await asker.hears()
        assert (reply.id, reply.rcode()) == (3, dns.rcode.SERVFAIL)
        assert served.counted("limits_reached", "dns_queries_per_pod") == 1


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 1)
    async with a_dns_server(STORE) as served:
        here = served.server.addresses[0]
        async with (
            await trio.open_tcp_stream(str(here.ip), here.port) as first,
            await trio.open_tcp_stream(str(here.ip), here.port) as second,
        ):
            with trio.fail_after(2):
                assert await second.receive_some() == b""
            await first.send_all(framed(a_query()))
            assert await first.receive_some()


async def test_silence_and_refusals_do_not_stop_the_server() -> None:
    async with a_dns_server(STORE) as served:
        asker = an_asker(served)
        for junk in (b"", b"short", b"\0\1\x80\0" + bytes(8)):
            await asker.send(junk)
        assert (await asker.asks(a_query()[:20])).rcode() == dns.rcode.FORMERR
        assert (await asker.asks(a_query())).answer


@pytest.mark.parametrize("where", ["corrected", "forwarded", "known", "answered"])
async def test_a_bug_ends_one_query_only(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    async def late_bug(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    client = FakeClient.web()
    async with (
        a_resolver(lambda data, _: [answered(data, RECORD)]) as resolver,
        a_dns_server(STORE, client=client) as served,
    ):
        meaning(served, resolver.endpoint)
        asker, known = an_asker(served), client.known
        dns_resolver = served.server.resolver
        match where:
            case "corrected":
                monkeypatch.setattr(Forwarded, where, bug)
            case "answered":
                monkeypatch.setattr(dns_resolver.tally, where, bug)
            case "forwarded":
                monkeypatch.setattr(dns_resolver, where, bug)
            case "known":
                client.known = None
                monkeypatch.setattr(dns_resolver, where, late_bug)
        with structlog.testing.capture_logs() as lines:
            await asker.send(a_query("example.org"))
            while not served.counted("bugs", "dns"):
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert [line["event"] for line in lines] == ["DNS query failed unexpectedly"]
        assert not served.server._under_way
        monkeypatch.undo()
        client.known = known
        assert (await asker.asks(a_query("example.org"))).answer


async def test_by_tcp_a_bug_ends_one_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_dns_server(STORE) as served:

        async def finish_stream(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            raise ZeroDivisionError

        monkeypatch.setattr(served.server.resolver, "finish_stream", finish_stream)
        here = served.server.addresses[0]
        with structlog.testing.capture_logs() as lines:
            async with await trio.open_tcp_stream(str(here.ip), here.port) as stream:
                await stream.send_all(framed(a_query("example.org")))
                with trio.fail_after(2):
                    assert await stream.receive_some() == b""
        assert (await an_asker(served).asks(a_query())).answer
        assert served.counted("bugs", "dns") == 1
        assert [line["event"] for line in lines] == ["DNS query failed unexpectedly"]


async def test_a_connection_that_is_gone_before_it_is_served_is_no_bug() -> None:
    async with a_dns_server(STORE) as served:
        here = served.server.addresses[0]
        sock = socket.create_connection((str(here.ip), here.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        assert (await an_asker(served).asks(a_query())).answer
        assert served.counted("bugs", "dns") == 0


@pytest.mark.parametrize("taken", ["udp", "tcp"])
async def test_a_taken_port_binds_nothing(taken: str) -> None:
    kind = socket.SOCK_DGRAM if taken == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if taken == "tcp":
            sock.listen()
        here = Endpoint.of(sock.getsockname())
        before = open_descriptors()
        with pytest.raises(ConfigError, match=f"failed to bind to address {here}"):
            async with a_dns_server(STORE, addresses=("127.0.0.1:0", str(here))):
                raise AssertionError
        # The epoll and wake-up descriptors of the reactor were never run, so never closed.
        assert open_descriptors() - before <= 2


async def test_both_loopbacks_are_served() -> None:
    async with a_dns_server(STORE, addresses=("127.0.0.1:0", "[::1]:0")) as served:
        assert [str(here.ip) for here in served.server.addresses] == ["127.0.0.1", "::1"]


async def test_without_ipv6_on_loopback_only_ipv4_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "loopback_has_ipv6", lambda sockets: False)
    async with a_dns_server(STORE, addresses=("127.0.0.1:0", "[::1]:0")) as served:
        assert [str(here.ip) for here in served.server.addresses] == ["127.0.0.1"]


async def test_without_connection_tracking_the_server_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise OSError(errno.EPROTONOSUPPORT, "no netfilter here")

    monkeypatch.setattr(module, "Conntrack", refuse)
    async with a_dns_server(STORE) as served:
        reply = await an_asker(served).asks(a_query("example.org"))
        assert reply.rcode() == dns.rcode.SERVFAIL


async def test_when_it_ends_everything_is_closed() -> None:
    before = open_descriptors()
    async with a_resolver(silence) as resolver:
        async with a_dns_server(STORE) as served:
            meaning(served, resolver.endpoint)
            here = served.server.addresses[0]
            asker = an_asker(served)
            await asker.send(a_query("example.org"))
            stream = await trio.open_tcp_stream(str(here.ip), here.port)
            await trio.testing.wait_all_tasks_blocked(0.05)
        await stream.aclose()
        assert served.server.addresses == []
    assert open_descriptors() == before


async def test_draining_waits_for_what_is_under_way(nursery: trio.Nursery) -> None:
    release = trio.Event()
    client = FakeClient(None)
    async with a_dns_server(STORE, client=client) as served:
        asker, here = an_asker(served), served.server.addresses[0]
        await asker.send(a_query())
        await trio.testing.wait_all_tasks_blocked(0.05)

        async def drain() -> None:
            await served.server.drain(30)
            release.set()

        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not release.is_set()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(str(here.ip), here.port)
        client.known = FakeClient.web().known
        client.told.set()
        assert (await asker.hears()).answer
        with trio.fail_after(2):
            await release.wait()


async def test_draining_waits_no_longer_than_it_may() -> None:
    async with a_dns_server(STORE, client=FakeClient(None)) as served:
        await an_asker(served).send(a_query())
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(2):
            await served.server.drain(0.05)


async def test_draining_an_idle_server_takes_no_time() -> None:
    async with a_dns_server(STORE) as served:
        with trio.fail_after(1):
            await served.server.drain(60)


def test_settings_come_from_the_configuration() -> None:
    config = Config.from_env(
        {
            "CLUSTER_DOMAIN": "my.domain",
            "PREFERED_SERVICE_NAMESPACE": "liked",
            "IPV6_ENABLED": "false",
            "CA_ROOT_CA": "unused",
        },
        read_file=lambda path: "",
    )
    settings = DnsSettings.of(config)
    assert [str(here) for here in settings.addresses] == ["127.0.0.1:15053", "[::1]:15053"]
    assert settings.cluster_domain == "my.domain"
    assert settings.preferred_namespace == "liked"
    assert not settings.ipv6
    assert DnsSettings.of(Config()).preferred_namespace is None
    assert not settings.is_pods_own
    assert DnsSettings.of(Config(mode=ProxyMode.DEDICATED)).is_pods_own


@pytest.mark.parametrize("is_pods_own", [False, True])
async def test_a_search_list_counts_if_it_is_the_pods_own(
    tmp_path: Path, *, is_pods_own: bool
) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("search corp.example\n")
    async with a_dns_server(STORE, resolv_conf=conf, is_pods_own=is_pods_own) as served:
        for name, is_searched in [
            ("cart.shop.corp.example", is_pods_own),
            ("cart.shop.shop.svc.cluster.local", not is_pods_own),
        ]:
            reply = await an_asker(served).asks(a_query(name))
            owners = [f"{name}.", "cart.shop."] if is_searched else []
            assert [str(rrset.name) for rrset in reply.answer] == owners
