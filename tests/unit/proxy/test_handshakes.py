from __future__ import annotations

from ipaddress import ip_address

import trio

from ztunnel.proxy.handshakes import Handshakes

GREEDY, HONEST, OTHER = (ip_address(f"192.0.2.{number}") for number in (1, 2, 3))


async def test_places_run_out_for_one_caller_and_come_back() -> None:
    handshakes = Handshakes(2)
    scopes = [handshakes.begin(GREEDY, seconds=1) for _ in range(3)]
    assert scopes[2] is None
    assert handshakes.taken == 2
    assert scopes[0] is not None
    handshakes.end(scopes[0])
    assert handshakes.begin(GREEDY, seconds=1) is not None


async def test_the_oldest_of_whoever_has_the_most_gives_way_to_who_has_fewer() -> None:
    handshakes = Handshakes(4)
    first = [handshakes.begin(GREEDY, seconds=1) for _ in range(3)]
    early = handshakes.begin(OTHER, seconds=1)
    late = handshakes.begin(HONEST, seconds=1)
    assert late is not None
    assert [scope.cancel_called for scope in first if scope] == [True, False, False]
    assert early is not None
    assert not early.cancel_called
    assert handshakes.taken == 4
    assert handshakes.begin(OTHER, seconds=1) is None, "two against two: nobody has too many"


async def test_a_place_that_was_given_away_is_not_freed_twice() -> None:
    handshakes = Handshakes(2)
    scopes = [handshakes.begin(GREEDY, seconds=1) for _ in range(2)]
    assert handshakes.begin(HONEST, seconds=1) is not None
    for scope in scopes:
        assert scope is not None
        handshakes.end(scope)
    assert handshakes.taken == 1
    assert handshakes.begin(GREEDY, seconds=1) is not None


async def test_addresses_of_one_ipv6_network_are_one_caller() -> None:
    handshakes = Handshakes(2)
    for number in (1, 2):
        assert handshakes.begin(ip_address(f"2001:db8::{number}"), seconds=1)
    assert handshakes.begin(ip_address("2001:db8::3"), seconds=1) is None
    assert handshakes.begin(ip_address("2001:db8:1::1"), seconds=1)


async def test_a_handshake_has_so_many_seconds(autojump_clock) -> None:
    scope = Handshakes(1).begin(HONEST, seconds=3)
    assert scope is not None
    began = trio.current_time()
    with scope:
        await trio.sleep_forever()
    assert trio.current_time() - began == 3
