from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from ztunnel.transport.resolver import RESOLVE_SECONDS, resolve


class Resolver(trio.abc.HostnameResolver):
    """Knows one name; others fail, or never answer."""

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002
        await trio.lowlevel.checkpoint()
        if host in (b"silent.test", "silent.test"):
            await trio.sleep_forever()
        if host not in (b"known.test", "known.test"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = [(socket.AF_INET, type, 6, "", ("192.0.2.1", 0))] * 2
        if family == socket.AF_UNSPEC:
            found.append((socket.AF_INET6, type, 6, "", ("2001:db8::1", 0, 0, 0)))
        return found

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def addresses(hostname: str, *, ipv6: bool = True) -> list[str] | None:
    trio.socket.set_custom_hostname_resolver(Resolver())
    found = await resolve(hostname, ipv6=ipv6)
    return None if found is None else [str(ip) for ip in found]


async def test_a_name_gives_each_of_its_addresses_once() -> None:
    assert await addresses("known.test") == ["192.0.2.1", "2001:db8::1"]


async def test_without_ipv6_only_ipv4_addresses_are_asked_for() -> None:
    assert await addresses("known.test", ipv6=False) == ["192.0.2.1"]


async def test_an_unknown_name_has_no_answer() -> None:
    assert await addresses("unknown.test") is None


@pytest.mark.parametrize("name", ["a" * 64 + ".test", "..", "\u00e9" * 64, "\udcff", "a\0b"])
async def test_what_is_no_host_name_has_no_answer(name: str) -> None:
    assert await resolve(name) is None


async def test_a_resolver_that_is_silent_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    assert await addresses("silent.test") is None
    assert trio.current_time() == pytest.approx(RESOLVE_SECONDS)
