from __future__ import annotations

from ipaddress import ip_address

from ztunnel.model.network import IpAddress
from ztunnel.proxy.handshakes import Handshakes

GREEDY, HONEST, OTHER = (ip_address(f"192.0.2.{number}") for number in (1, 2, 3))


class Silent:
    """A handshake that says whether it had to give way."""

    def __init__(self) -> None:
        self.gave_way = False

    def give_way(self) -> None:
        self.gave_way = True


def begin(handshakes: Handshakes, ip: IpAddress) -> Silent | None:
    one = Silent()
    return one if handshakes.begin(ip, one) else None


def test_places_run_out_for_one_caller_and_come_back() -> None:
    handshakes = Handshakes(2)
    begun = [begin(handshakes, GREEDY) for _ in range(3)]
    assert begun[2] is None
    assert handshakes.taken == 2
    assert begun[0] is not None
    handshakes.end(begun[0])
    assert begin(handshakes, GREEDY) is not None


def test_the_oldest_of_whoever_has_the_most_gives_way_to_who_has_fewer() -> None:
    handshakes = Handshakes(4)
    first = [begin(handshakes, GREEDY) for _ in range(3)]
    early = begin(handshakes, OTHER)
    late = begin(handshakes, HONEST)
    assert late is not None
    assert [one.gave_way for one in first if one] == [True, False, False]
    assert early is not None
    assert not early.gave_way
    assert handshakes.taken == 4
    assert begin(handshakes, OTHER) is None, "two against two: nobody has too many"


def test_a_place_that_was_given_away_is_not_freed_twice() -> None:
    handshakes = Handshakes(2)
    begun = [begin(handshakes, GREEDY) for _ in range(2)]
    assert begin(handshakes, HONEST) is not None
    for one in begun:
        assert one is not None
        handshakes.end(one)
    assert handshakes.taken == 1
    assert begin(handshakes, GREEDY) is not None


def test_addresses_of_one_ipv6_network_are_one_caller() -> None:
    handshakes = Handshakes(2)
    for number in (1, 2):
        assert begin(handshakes, ip_address(f"2001:db8::{number}"))
    assert begin(handshakes, ip_address("2001:db8::3")) is None
    assert begin(handshakes, ip_address("2001:db8:1::1"))
